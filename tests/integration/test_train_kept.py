"""A run that chooses its micro-batch and keeps what its frozen prefix gives, killed once, against one that does neither."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_store import make_inputs

EPOCH_STEPS, EPOCHS, KILLED_AT = 8, 3, 13


@dataclass
class KillingSink:
    """Ends rank 0 once, in the second epoch."""

    folder: Path

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        marker = self.folder / "killed"
        if step == KILLED_AT and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def log_event(self, name: str, step: int, message: str) -> None: ...

    def close(self) -> None: ...


def make_request(folder: Path, run: str, **train: Any) -> Any:
    from layerplan.config.plan import FreezeShallowPlanConfig
    from layerplan.config.train import OptimizerConfig, TrainConfig
    from layerplan.models.files import identify_model, load_hf_config
    from layerplan.models.ref import ModelRef
    from layerplan.plan.model_shape import ModelShape
    from layerplan.plan.policies import make_plan
    from layerplan.train.trainer import TrainRequest

    base = str(folder / "base")
    shape = ModelShape.from_hf_config(load_hf_config(base))
    plan = make_plan(FreezeShallowPlanConfig(boundary=2), model=identify_model(base), shape=shape)
    config = TrainConfig(
        max_steps=EPOCHS * EPOCH_STEPS,
        global_batch_size=8,
        num_workers=2,
        num_cpus_per_worker=0.5,
        compute_dtype="float32",
        parallelism="shard",
        frozen_sharding="replicate",
        log_every_steps=1,
        checkpoint_every_steps=5,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        **train,
    )
    return TrainRequest(folder / run, ModelRef(base), plan, folder / "store", config, seed=0)


def test_what_is_chosen_and_kept_changes_no_byte(
    ray_local: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows move between the two workers from epoch to epoch; what the killed attempt wrote is read by the next."""
    from layerplan.errors import TrainingError
    from layerplan.train.trainer import run_training

    make_inputs(tmp_path, num_layers=3)
    plain = run_training(make_request(tmp_path, "plain", micro_batch_size=4))
    kept = make_request(tmp_path, "kept", micro_batch_size="auto", cache_prefix="on")
    folder = kept.run_dir
    result = run_training(replace(kept, sink_factory=lambda step: KillingSink(folder)))
    assert (folder / "killed").exists() and result.final_step == EPOCHS * EPOCH_STEPS
    weights = [each.hf_dir / "model.safetensors" for each in (plain, result)]  # type: ignore[operator]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (plain.micro_batch_size, result.micro_batch_size) == (4, 4)
    assert json.loads((folder / "micro_batch.json").read_text()) == {"rows": 4, "state": "fits"}
    assert not list(folder.glob("prefix_cache/*")), "it is removed after the last step"
    refused = make_request(tmp_path, "refused", micro_batch_size=4, cache_prefix="on")
    sharded = refused.config.model_copy(update={"frozen_sharding": "shard", "max_failures": 0})
    with pytest.raises(TrainingError, match=r"train\.cache_prefix=on: frozen layers are sharded.*frozen_sharding=repl"):
        run_training(replace(refused, config=sharded))
