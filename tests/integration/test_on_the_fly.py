"""A run that tokenizes while it trains is killed, goes on with fewer workers and stands still; no row is lost or comes twice.

The file is also the program the test starts: `python test_on_the_fly.py FOLDER WORKERS KILL_STEP` trains to the end, or
until step KILL_STEP kills its driver, on the cluster of RAY_ADDRESS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.ray_script import run_script

MAX_STEPS = 24
LANES = 4
STOPPED_AT, STALL_S = 17, 20.0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_with_fewer_workers_on_the_rows_that_are_left(
    tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    write_text(tmp_path / "raw")
    """What is killed first is the driver of two workers; then the one worker that goes on is stopped, and started anew."""
    killed = run_script(__file__, tmp_path, 2, 9, timeout_s=400, **shared_cluster)
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-3000:]
    finished = run_script(__file__, tmp_path, 1, 0, timeout_s=400, **shared_cluster)
    assert finished.returncode == 0, finished.stdout[-5000:]
    (stalled,) = [line for line in finished.stdout.splitlines() if "no progress" in line]
    assert "[watch] " in stalled, stalled
    assert "rank 0 (pid " in stalled and "its process is stopped and says nothing" in stalled, stalled
    assert "s after a worker was lost" in finished.stdout, finished.stdout[-3000:]

    from layerplan.corpus.lanes import LaneStream
    from layerplan.corpus.manifest import Manifest
    from layerplan.train.ledger_check import check_epochs, load_ledger

    steps = load_ledger(tmp_path / "run")
    stream = LaneStream(tmp_path / "stream", num_lanes=LANES, rank=0, world_size=1)
    assert [step.row_ids for step in steps] == [
        tuple(np.sort(stream.take().row_ids).tolist()) for _ in range(MAX_STEPS)
    ]
    (proof,) = check_epochs(steps, Manifest.load(tmp_path / "stream"))
    assert proof.rows_in_open_epoch == MAX_STEPS * LANES
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*/train_state.json"))
    cursor = json.loads(newest.read_text())["data_cursor"]
    assert cursor == [stream.cursor[lane] for lane in range(LANES)] and len(json.dumps(cursor)) < 1024


def write_text(folder: Path) -> None:
    """4,000 short documents of letters: 22 chunks, which give different numbers of rows."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "a.jsonl").open("w") as handle:
        for size in rng.integers(60, 700, 4000).tolist():
            handle.write(json.dumps({"text": "".join(map(chr, rng.integers(97, 123, size).tolist()))}) + "\n")


@dataclass
class AccidentSink:
    """A sink in the worker that kills the driver at a step, or stops its own process once."""

    at: int
    driver: int
    stopped: Path

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        time.sleep(0.1 if step < STOPPED_AT else 1.0)  # the driver looks every 2 s, and must see training go on
        if "train/loss" in metrics and step == self.at:
            os.kill(self.driver, signal.SIGKILL)
            time.sleep(5)
        if "train/loss" in metrics and step == STOPPED_AT and not self.stopped.exists():
            self.stopped.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    def log_event(self, name: str, step: int, message: str) -> None: ...

    def close(self) -> None: ...


def make_stream(folder: Path) -> None:
    """A tokenizer of letters that fits the small model, and the stream over the text."""
    from tokenizers import Tokenizer, models

    from layerplan.config.corpus import CorpusConfig, SourceConfig
    from layerplan.corpus.on_the_fly import write_stream

    vocab = {chr(97 + number): number for number in range(26)} | {"<|endoftext|>": 26}
    Tokenizer(models.BPE(vocab=vocab, merges=[])).save(str(folder / "tokenizer.json"))
    config = CorpusConfig(
        sources=[SourceConfig(path=str(folder / "raw"))],
        mode="on_the_fly",
        seq_len=32,
        deduplicate=False,
        validation_rows=0,
    )
    write_stream(config, folder / "tokenizer.json", folder / "stream")


def main() -> None:
    import ray
    from test_train_resume import make_request

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from layerplan.train.trainer import run_training
    from tests.tiny_store import make_inputs

    folder, workers, kill_step, driver = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), os.getpid()
    if not (folder / "store").exists():
        make_inputs(folder)
    make_stream(folder)
    connect(ClusterConfig(), min_cpus=1)
    request = make_request(folder, "run")
    update = {"max_steps": MAX_STEPS, "num_workers": workers, "stall_timeout": STALL_S}
    config = request.config.model_copy(update=update)
    run_training(
        replace(
            request,
            store=folder / "stream",
            config=config,
            sink_factory=lambda step: AccidentSink(kill_step, driver, folder / "stopped"),
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    sys.exit(run_guarded(main))
