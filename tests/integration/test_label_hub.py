"""The shipped configs of the hub's data sets, read by their ids through the real clients from a stand-in for the hub.

What it serves has the layout, columns and labels that the data sets' pages give; the data sets themselves are not at hand.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_server import serving_data_set
from tests.ray_script import run_script

LOAD = """
import json, sys
from eval.label_tasks import load_task
from layerplan.config.load import load_config
task = load_task(load_config(sys.argv[1]).finetune.task)
print("TASK" + json.dumps([[item.prompt, item.label] for item in (*task.train, *task.test)]))
"""
CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def card(subset: str, folder: str) -> bytes:
    """A data set's page with one configuration."""
    splits = "".join(f"  - split: {name}\n    path: {folder}{name}-*\n" for name in ("train", "test"))
    return f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n{splits}---\n".encode()


def parquet(columns: dict[str, Sequence[Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def lines(columns: dict[str, Sequence[Any]]) -> bytes:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


EMOTION = {"text": ["i feel fine", "i am afraid"], "label": [1, 4]}
PAIRS = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [1, 0], "idx": [0, 1]}
REVIEW = {"text": ["dull", "a joy"], "label": [0, 4], "label_text": ["very negative", "very positive"]}
QUESTION = {"text": ["Who is it ?", "Where ?"], "coarse_label": [3, 4], "fine_label": [1, 2]}
FILES = {
    "carer": {
        "README.md": card("split", "split/"),
        "split/train-00000-of-00001.parquet": parquet(EMOTION),
        "split/test-00000-of-00001.parquet": parquet(EMOTION),
    },
    "mrpc": {
        "README.md": card("mrpc", "mrpc/"),
        "mrpc/train-00000-of-00001.parquet": parquet(PAIRS),
        "mrpc/test-00000-of-00001.parquet": parquet(PAIRS),
    },
    "sst5": {"README.md": b"# SST5\n", "train.jsonl": lines(REVIEW), "test.jsonl": lines(REVIEW)},
    "trec": {"default/train/0000.parquet": parquet(QUESTION), "default/test/0000.parquet": parquet(QUESTION)},
}
NAMES = {"carer": "dair-ai/emotion", "mrpc": "nyu-mll/glue", "sst5": "SetFit/sst5", "trec": "CogComp/trec"}
PROMPTS = {
    "carer": [["Message: i feel fine\nEmotion:", "1"], ["Message: i am afraid\nEmotion:", "4"]],
    "mrpc": [
        ["First: a\nSecond: b\nDo they say the same?", "1"],
        ["First: c\nSecond: d\nDo they say the same?", "0"],
    ],
    "sst5": [["Review: dull\nIt was", "0"], ["Review: a joy\nIt was", "4"]],
    "trec": [["Question: Who is it ?\nIt asks for", "3"], ["Question: Where ?\nIt asks for", "4"]],
}


@pytest.mark.parametrize("config", NAMES)
def test_a_shipped_config_reads_its_data_set_by_id(config: str, tmp_path: Path) -> None:
    with serving_data_set(NAMES[config], FILES[config], token="hf_right") as (endpoint, _):
        env = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_right"}
        script = tmp_path / "load.py"
        script.write_text(LOAD)
        done = run_script(str(script), CONFIGS / f"finetune_{config}.yaml", timeout_s=120, **env)
    assert done.returncode == 0, done.stdout[-3000:]
    (found,) = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("TASK")]
    assert found == PROMPTS[config] * 2, "the rows of train, then those of test"
