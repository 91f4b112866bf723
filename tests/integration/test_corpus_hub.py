"""A gated data set of the hub by its id: split, token, byte ranges, and a store built of it on Ray."""

from __future__ import annotations

import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.hub_server import COMMIT, HubRepository, serving, serving_data_set
from tests.tiny_corpus import make_text

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.jsonl
  - split: test
    path: data/test-*.jsonl
---
"""


def make_lines(first: int, count: int) -> bytes:
    records = [
        {"id": number, "text": make_text(number, 900), "score": number / 100} for number in range(first, first + count)
    ]
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def test_a_data_set_that_is_a_script_is_told_where_its_files_are(tmp_path: Path) -> None:
    files = {"pages.py": b"raise SystemExit", "pages.zip": b"PK"}
    asked = "from layerplan.config.corpus import SourceConfig; from layerplan.corpus.hub import list_hub_files"
    code = f"{asked}; list_hub_files(SourceConfig(path='hub://owner/pages'))"
    with serving_data_set("owner/pages", files, token="hf_right") as (endpoint, _):
        env = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": "hf_right",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
        )
    assert "no longer supported, but found pages.py); set revision: refs/convert/parquet" in done.stderr, done.stderr


def list_sources(repository: HubRepository, cache: Path, *sources: dict[str, str]) -> list[str]:
    """What is said of each source, and the names of its files in the repository, or the error."""
    code = """
import json, sys
from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.sources import list_units
from layerplan.errors import CorpusError
for source in json.loads(sys.argv[1]):
    said = []
    try:
        units = list_units(CorpusConfig(sources=[source]), report=said.append)
        said += [unit.path.partition("@")[2].partition("/")[2] for unit in units]
    except CorpusError as error:
        said += [str(error)]
    print("SAID" + "; ".join(line.partition(f"{source['path']}: ")[2] or line for line in said))
"""
    with serving(repository):
        env = os.environ | {"HF_ENDPOINT": repository.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache)}
        command = [sys.executable, "-c", code, json.dumps(sources)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line[4:] for line in done.stdout.splitlines() if line.startswith("SAID")]


def test_of_the_hubs_own_conversion_one_subset_is_read(tmp_path: Path) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": [make_text(0, 300)]}), table)
    names = ("en/train/0000.parquet", "zh/partial-train/0000.parquet", "zh/test/0000.parquet")
    commits = {COMMIT: {"pages.py": b""}, "b" * 40: {".gitattributes": b"", **dict.fromkeys(names, table.getvalue())}}
    branches = {"main": COMMIT, "refs/convert/parquet": "b" * 40}
    source = {"path": "hub://owner/pages", "revision": "refs/convert/parquet"}
    chosen = ({}, {"subset": "fr"}, {"subset": "en"}, {"subset": "zh"})

    repository = HubRepository("datasets", "owner/pages", commits, branches)
    none, wrong, whole, part = list_sources(repository, tmp_path, *(source | subset for subset in chosen))

    assert none == "the hub's conversion has several subsets; set subset to one of en, zh"
    assert wrong == "the hub's conversion has no subset 'fr'; set subset to one of en, zh"
    assert whole == "en/train/0000.parquet"
    assert part == (
        "is a part of the split: the hub converts the first 5 GB of a large one and no more; zh/partial-train/0000.parquet"
    )


def test_files_of_a_split_that_nothing_here_reads_are_told(tmp_path: Path) -> None:
    files = {"a.jsonl": make_lines(0, 1), "b.jsonl.xz": lzma.compress(make_lines(1, 1))}
    repository = HubRepository("datasets", "owner/pages", {COMMIT: files})
    (said,) = list_sources(repository, tmp_path, {"path": "hub://owner/pages"})
    assert said == "reads 1 files; not read: 1 of no known format (b.jsonl.xz); a.jsonl"


def test_a_gated_data_set_is_streamed_into_a_store(
    seed_model: str, run_job: Callable[..., Any], shared_cluster: dict[str, str], tmp_path: Path
) -> None:
    files = {
        "README.md": CARD.encode(),
        "data/train-00.jsonl": make_lines(0, 60) + b"{broken\n",
        "data/train-01.jsonl": make_lines(60, 40),
        "data/test-00.jsonl": make_lines(100, 30),
    }
    source = {"path": "hub://owner/pages", "score_column": "score"}
    corpus = {"sources": [source], "seq_len": 64, "validation_rows": 4, "max_bad_fraction": 0.1}
    corpus |= {"filters": {"min_score": 0.1}, "rows_per_group": 2}
    config = {"name": "hub", "storage_path": str(tmp_path / "runs"), "corpus": corpus, "cluster": {"num_cpus": 2}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"model": {"type": "pretrained", "name": seed_model}}))

    with serving_data_set("owner/pages", files, token="hf_right") as (endpoint, ranges):
        env = shared_cluster | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        refused = run_job("jobs/build_corpus.py", "--config", path, env=env | {"HF_TOKEN": "hf_wrong"})
        wrong = ("--set", "corpus.sources=[{path: hub://owner/pages, split: dev}]")
        no_split = run_job("jobs/build_corpus.py", "--config", path, *wrong, env=env | {"HF_TOKEN": "hf_right"})
        assert ranges == []
        built = run_job("jobs/build_corpus.py", "--config", path, env=env | {"HF_TOKEN": "hf_right"})

    assert refused.returncode != 0, refused.output[-2000:]
    assert "DatasetNotFoundError" in refused.output and "gated" in refused.output, refused.output[-2000:]
    assert "has no split 'dev'; it has train, test" in no_split.output, no_split.output[-2000:]
    assert built.returncode == 0, built.output[-3000:]
    manifest = json.loads((tmp_path / "runs" / "hub" / "token_store" / "manifest.json").read_text())
    assert manifest["counts"] == {"in": 101, "kept": 90, "filtered/score": 10, "quarantined": 1}
    assert {line.partition(" ")[0] for line in ranges} == {"data/train-00.jsonl", "data/train-01.jsonl"}
