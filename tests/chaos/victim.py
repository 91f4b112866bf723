"""The program a storm hurts, `victim.py FOLDER RUN [tracking address]`: trains on a Ray of its own.

Rank 0 goes slowly enough for a fault to meet a step, and writes no metrics but to the tracking server, when there is one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MAX_STEPS = 24
STEP_S = 0.3
HOLD_NAME, HOLD_S = "hold", 60
"""A file in the storm's folder, and how long rank 0 waits in its step while it is there: Ray takes 12 to 20 s to end a driver
whose node or head was killed, and a run of a few steps would be over by then."""


@dataclass
class SlowSink:
    """Waits a moment every step."""

    hold: Path
    inner: Any = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self.inner is not None:
            self.inner.log_metrics(metrics, step)
        if "train/loss" in metrics:
            time.sleep(STEP_S)
            deadline = time.monotonic() + HOLD_S
            while self.hold.exists() and time.monotonic() < deadline:
                time.sleep(0.1)

    def log_event(self, name: str, step: int, message: str) -> None:
        if self.inner is not None:
            self.inner.log_event(name, step, message)

    def close(self) -> None:
        if self.inner is not None:
            self.inner.close()


def make_request(folder: Path, run: str) -> Any:
    """Two workers, two frozen and trained layers, a checkpoint every two steps."""
    from layerplan.config.plan import FreezeShallowPlanConfig
    from layerplan.config.train import OptimizerConfig, TrainConfig
    from layerplan.models.files import identify_model, load_hf_config
    from layerplan.models.ref import ModelRef
    from layerplan.plan.model_shape import ModelShape
    from layerplan.plan.policies import make_plan
    from layerplan.train.request import TrainRequest

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
        num_workers=2,
        num_cpus_per_worker=0.5,
        compute_dtype="float32",
        parallelism="shard",
        log_every_steps=1,
        checkpoint_every_steps=2,
        validate_every_steps=12,
        keep_checkpoints=3,
        stall_timeout=15.0,
        max_failures=10,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        write_ledger=True,
    )
    return TrainRequest(folder / run, ModelRef(base), plan, folder / "store", config, seed=0)


def main() -> None:
    """Trains to the end of the run."""
    import ray

    from layerplan.config.cluster import ClusterConfig
    from layerplan.config.tracking import TrackingConfig
    from layerplan.ray_session import connect
    from layerplan.tracking.tracker import RunSinkFactory, open_tracker
    from layerplan.train.trainer import run_training
    from tests.worker_zygote import forked_workers

    folder, run, address = Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
    with forked_workers():
        connect(ClusterConfig(num_cpus=4), min_cpus=1)
    request = make_request(folder, run)
    request.run_dir.mkdir(parents=True, exist_ok=True)
    if address is None:
        run_training(replace(request, sink_factory=lambda start: SlowSink(folder / HOLD_NAME)))
    else:
        tracker = open_tracker(TrackingConfig(backend="mlflow", uri=address), request.run_dir, run)
        sinks = RunSinkFactory(request.run_dir / "metrics.jsonl", "train", tracker)
        run_training(replace(request, sink_factory=lambda start: SlowSink(folder / HOLD_NAME, sinks(start))))
        tracker.close()
    ray.shutdown()
