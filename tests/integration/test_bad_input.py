"""Bad input as a user meets it: one clear line that names the field or file, the exit code, no traceback, no harm done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerplan.pipeline.run_lease import hold_run
from tests.conftest import SHARED_CPUS

CONFIG_FAULTS = [
    (["train.max_stepz=3"], ["train.max_stepz", "unknown"]),
    (["train.max_steps=0"], ["train.max_steps", "0", "greater than or equal to 1"]),
    (["train.max_steps=many"], ["train.max_steps", "many", "integer"]),
    (["plan.type=freeze_some"], ["plan", "freeze_some", "freeze_deep"]),
    (["train.optimizer.learning_rate=-1", "corpus.seq_len=1"], ["train.optimizer.learning_rate", "corpus.seq_len"]),
    (["train.global_batch_size=5"], ["global_batch_size", "5"]),
]


def fails(job: Any, code: int, *words: str) -> None:
    lines = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert job.returncode == code, job.output[-3000:]
    assert lines, job.output[-3000:]
    assert "Traceback" not in job.output, job.output[-3000:]
    for word in words:
        assert any(word in line for line in lines), (word, lines)


@pytest.mark.parametrize(("settings", "words"), CONFIG_FAULTS)
def test_a_bad_setting_is_exit_2_and_names_itself(
    settings: list[str], words: list[str], tiny_config: Path, tmp_path: Path, run_here: Callable[..., Any]
) -> None:
    arguments = [part for setting in ["name=bad", *settings] for part in ("--set", setting)]
    job = run_here("jobs/cpt.py", "--config", tiny_config, "--set", f"storage_path={tmp_path / 'runs'}", *arguments)
    fails(job, 2, *words)
    assert len([line for line in job.output.splitlines() if line.startswith("error: ")]) == len(settings)
    assert not (tmp_path / "runs").exists()


def test_a_config_that_is_missing_or_not_yaml_is_exit_2(tmp_path: Path, run_job: Callable[..., Any]) -> None:
    fails(run_job("jobs/cpt.py", "--config", tmp_path / "none.yaml"), 2, "none.yaml")
    (tmp_path / "bad.yaml").write_text("train: [1, 2\n")
    fails(run_job("jobs/cpt.py", "--config", tmp_path / "bad.yaml"), 2, "bad.yaml")


def test_an_occupied_name_with_another_config_is_refused_and_kept(
    finished_run: Path, tiny_config: Path, tmp_path: Path, run_here: Callable[..., Any]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "quiet")  # other tests submit the run itself again
    before = digest(run)
    job = run_here(
        *("jobs/cpt.py", "--config", tiny_config, "--set", f"storage_path={tmp_path}"),
        *("--set", "name=quiet", "--set", "train.optimizer.learning_rate=0.5"),
        *("--set", "evaluation.backend=vllm", "--set", "evaluation.protocols=[logit, generate]"),
    )
    fails(job, 2, "name: run 'quiet' exists with train.optimizer.learning_rate=0.001, this config has 0.5")
    assert digest(run) == before


def test_a_name_that_is_being_run_is_refused_before_anything_is_written(
    tiny_config: Path, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    with hold_run(tmp_path / "busy", "busy"):
        settings = ("--set", f"storage_path={tmp_path}", "--set", "name=busy")
        job = run_job("jobs/build_corpus.py", "--config", tiny_config, *settings)
        fails(job, 1, f"name: run 'busy' is being run by process {os.getpid()} on {socket.gethostname()}")
        assert len(list((tmp_path / "busy").iterdir())) == 1, "the lease of who runs it"


def corrupt_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "text": ["some text"]}), folder / "raw.parquet")
    whole = (folder / "raw.parquet").read_bytes()
    (folder / "raw.parquet").write_bytes(whole[: len(whole) // 2])


def corrupt_jsonl(folder: Path) -> None:
    (folder / "raw.jsonl").write_text('{"id": "a", "te\n' * 20)


def empty_files(folder: Path) -> None:
    (folder / "raw.jsonl").write_text("")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (corrupt_parquet, ["raw.parquet", "max_bad_fraction"]),
        (corrupt_jsonl, ["raw.jsonl:1", "max_bad_fraction"]),
        (empty_files, ["corpus.sources"]),
        (nothing, ["corpus.sources"]),
        (None, ["corpus.sources", "no such file or folder"]),
    ],
)
def test_a_corpus_that_cannot_be_used_is_exit_1(
    make: Callable[[Path], None] | None,
    words: list[str],
    finished_run: Path,
    tiny_config: Path,
    tmp_path: Path,
    run_here: Callable[..., Any],
) -> None:
    raw = tmp_path / "raw"
    if make is not None:
        raw.mkdir()
        make(raw)
    model = next((finished_run / "base_model" / "hf").iterdir())
    job = run_here(
        *("jobs/build_corpus.py", "--config", tiny_config, "--set", f"storage_path={tmp_path / 'runs'}"),
        *("--set", "name=bad", "--set", f"model={json.dumps({'type': 'pretrained', 'name': str(model)})}"),
        *("--set", f"corpus.sources={json.dumps([{'path': str(raw)}])}", "--set", "tracking.backend=none"),
    )
    fails(job, 1, *words)
    assert not list((tmp_path / "runs").rglob("manifest.json"))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def with_a_larger_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(50)])
    tokenizer.save(str(folder / "tokenizer.json"))


def with_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_weights, ["no *.safetensors weights"]),
        (without_tokenizer, ["tokenizer.json"]),
        (with_a_larger_tokenizer, ["tokenizer", "does not fit the model"]),
        (with_a_broken_config, ["config.json", "not a readable config"]),
    ],
)
def test_a_model_folder_that_cannot_be_used_is_exit_1(
    damage: Callable[[Path], None],
    words: list[str],
    finished_run: Path,
    tiny_config: Path,
    tmp_path: Path,
    run_here: Callable[..., Any],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(next((finished_run / "base_model" / "hf").iterdir()), model)
    damage(model)
    job = run_here(
        *("jobs/cpt.py", "--config", tiny_config, "--set", f"storage_path={tmp_path / 'runs'}", "--set", "name=bad"),
        *("--set", f"model={json.dumps({'type': 'pretrained', 'name': str(model)})}"),
        *("--set", 'plan={"type": "freeze_deep", "boundary": 1}', "--set", "tracking.backend=none"),
    )
    fails(job, 1, *words)
    assert not (tmp_path / "runs" / "bad" / "training.json").exists()


def test_a_missing_model_folder_and_a_small_cluster_are_exit_1(
    tiny_config: Path, tmp_path: Path, run_here: Callable[..., Any]
) -> None:
    base = ("jobs/cpt.py", "--config", tiny_config, "--set", f"storage_path={tmp_path}", "--set", "name=bad")
    model = json.dumps({"type": "pretrained", "name": "/nowhere/model"})
    fails(run_here(*base, "--set", f"model={model}", "--dry-run"), 1, "model.name=/nowhere/model", "no such folder")
    job = run_here(*base, "--set", "train.num_cpus_per_worker=64", "--set", "tracking.backend=none")
    fails(job, 1, f"cluster: has {SHARED_CPUS} CPU, the run needs at least 128.25")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
