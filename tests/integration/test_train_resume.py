"""A run on Ray that is stopped, killed, damaged and loses a worker ends bit for bit like one that never was interrupted.

The file is also the program the test starts: `python test_train_resume.py FOLDER RUN...` trains the named runs
on the cluster of RAY_ADDRESS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ray_script import run_script
from tests.tiny_store import make_inputs

MAX_STEPS = 10


@pytest.mark.long
def test_a_stopped_killed_damaged_and_crashed_run_ends_bit_exact(
    tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    """SIGTERM to the driver at step 2, Ctrl-C at step 3, SIGKILL of the driver at step 5, SIGKILL of a worker at step 8.

    In between, Ray's own index is deleted, then cut, and the newest checkpoint gets one bit flipped.
    """
    make_inputs(tmp_path)
    stopped = run_script(__file__, tmp_path, "interrupted", timeout_s=400, **shared_cluster)
    assert stopped.returncode == 143, stopped.stdout[-3000:]
    assert "SIGTERM: saving a checkpoint" in stopped.stdout
    saved = sorted(path.name for path in (tmp_path / "interrupted" / "checkpoints").glob("step_*"))
    assert saved, "the stopped run left no checkpoint"
    interrupted = run_script(__file__, tmp_path, "interrupted", timeout_s=400, **shared_cluster)
    assert interrupted.returncode == 130, interrupted.stdout[-3000:]
    assert "Ctrl-C (once more ends at once): saving a checkpoint" in interrupted.stdout
    assert "stopped by the user; submit the same run name again to continue" in interrupted.stdout
    assert sorted(path.name for path in (tmp_path / "interrupted" / "checkpoints").glob("step_*")) > saved
    ray_index = tmp_path / "interrupted" / "checkpoints" / "checkpoint_manager_snapshot.json"
    ray_index.unlink(missing_ok=True)  # a driver that ends early may have left none
    killed = run_script(__file__, tmp_path, "interrupted", timeout_s=400, **shared_cluster)
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-3000:]
    assert f"step 1/{MAX_STEPS}" not in killed.stdout, "training began again from nothing"
    ray_index.write_bytes(b'{"checkpoint_results": [')
    damaged = flip_a_bit_of_the_newest(ray_index.parent)
    finished = run_script(__file__, tmp_path, "interrupted", "quiet", timeout_s=400, **shared_cluster)
    assert finished.returncode == 0, finished.stdout[-5000:]
    assert "Reporting training result" not in finished.stdout, "Ray's line for every report of every rank"
    assert (tmp_path / "interrupted" / "worker.done").exists(), "the worker was never killed"
    said = [line for line in finished.stdout.splitlines() if f"{damaged.parent.name} is set aside" in line]
    assert len(said) == 1 and str(damaged) in said[0] and "going on from step_" in said[0], finished.stdout[-3000:]
    results = {name: json.loads((tmp_path / name / "training.json").read_text()) for name in ("interrupted", "quiet")}
    for field in ("final_loss", "first_loss", "validation_loss", "tokens_seen", "final_step"):
        assert results["interrupted"][field] == results["quiet"][field], field
    proofs = {name: result["proof"] for name, result in results.items()}
    for field in ("trainable_with_gradient", "frozen_without", "frozen_checksum"):
        assert proofs["interrupted"][field] == proofs["quiet"][field], field
    assert proofs["quiet"]["coverage_checks"] == 1 < proofs["interrupted"]["coverage_checks"]
    weights = [
        (tmp_path / name / results[name]["hf_dir"] / "model.safetensors").read_bytes()
        for name in ("interrupted", "quiet")
    ]
    assert weights[0] == weights[1]
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("interrupted", "quiet")]
    assert ledgers[0] == ledgers[1]
    assert len(ledgers[0].splitlines()) == MAX_STEPS
    assert not list((tmp_path / "quiet" / "checkpoints").glob("step_00000002")), "old checkpoints are removed"


def flip_a_bit_of_the_newest(checkpoints: Path) -> Path:
    """Returns the file: the second worker's shards."""
    sealed = sorted(path.parent for path in checkpoints.glob("step_*/seal.json"))
    assert len(sealed) > 1, "there is no older one to go back to"
    shard = sealed[-1] / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


@dataclass
class AccidentSink:
    """A sink in the worker that causes each accident once, from its step on, and one in each attempt."""

    folder: Path
    driver: int
    caused: bool = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if "train/loss" not in metrics or self.caused:
            return
        for name, at, victim, number in (
            ("stop", 2, self.driver, signal.SIGTERM),
            ("interrupt", 3, self.driver, signal.SIGINT),
            ("driver", 5, self.driver, signal.SIGKILL),
            ("worker", 8, os.getpid(), signal.SIGKILL),
        ):
            marker = self.folder / f"{name}.done"
            if step >= at and not marker.exists():
                self.caused = True
                marker.touch()
                os.kill(victim, number)
                time.sleep(2)  # the driver notices between two waits for Ray; these steps take milliseconds
                return

    def log_event(self, name: str, step: int, message: str) -> None: ...

    def close(self) -> None: ...


def make_request(folder: Path, run: str) -> Any:
    from layerplan.config.plan import FreezeShallowPlanConfig
    from layerplan.config.train import OptimizerConfig, TrainConfig
    from layerplan.models.files import identify_model, load_hf_config
    from layerplan.models.ref import ModelRef
    from layerplan.plan.model_shape import ModelShape
    from layerplan.plan.policies import make_plan
    from layerplan.train.trainer import TrainRequest

    base = str(folder / "base")
    plan = make_plan(
        FreezeShallowPlanConfig(boundary=1, tied="head_only", train_lm_head=True),
        model=identify_model(base),
        shape=ModelShape.from_hf_config(load_hf_config(base)),
        profile=None,
    )
    config = TrainConfig(
        max_steps=MAX_STEPS,
        global_batch_size=4,
        micro_batch_size=1,
        num_workers=2,
        num_cpus_per_worker=0.5,
        compute_dtype="float32",
        parallelism="shard",
        log_every_steps=1,
        checkpoint_every_steps=2,
        validate_every_steps=5,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        write_ledger=True,
    )
    driver = os.getpid()
    run_dir = folder / run
    sink: Callable[[int], Any] | None = None if run == "quiet" else lambda start: AccidentSink(run_dir, driver)
    return TrainRequest(run_dir, ModelRef(base), plan, folder / "store", config, seed=0, sink_factory=sink)


def main() -> None:
    import ray

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from layerplan.train.trainer import run_training

    folder = Path(sys.argv[1])
    connect(ClusterConfig(), min_cpus=1)
    for run in sys.argv[2:]:
        result = run_training(make_request(folder, run))
        assert run_training(make_request(folder, run)) == result, "a finished run is not trained again"
    ray.shutdown()


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts tests in the background
    sys.exit(run_guarded(main))
