"""A plan that changes during training, on Ray, against a plain loop that freezes, thaws and keeps moments by hand.

The file is also the program the test starts: `python test_plan_phases.py FOLDER RUN...` trains the named runs on the
cluster of RAY_ADDRESS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ray_script import run_script
from tests.tiny_store import make_inputs

MAX_STEPS, REWARM = 10, 2
PHASE_END, KILLED_AT = 4, 6
STOP_REQUEST = "stop_requested"


@pytest.mark.long
def test_phases_on_ray_equal_a_plain_loop_and_survive_a_kill(tmp_path: Path, shared_cluster: dict[str, str]) -> None:
    """Layer 2, then the feed-forward part of layer 0 with the final norm, then that part of both layers.

    Moments are dropped, kept, and kept through a stop.

    The interrupted run is asked to stop in the last step of its first phase, and killed in its second.
    """
    import torch
    from safetensors.torch import load_file

    make_inputs(tmp_path, num_layers=3)
    killed = run_script(__file__, tmp_path, "keep_killed", "keep_killed", timeout_s=900, **shared_cluster)
    assert "stopped at step 4" in killed.stdout, killed.stdout[-3000:]
    assert killed.returncode == -signal.SIGKILL, killed.stdout[-3000:]
    done = run_script(__file__, tmp_path, "keep_killed", "keep", "drop", timeout_s=900, **shared_cluster)
    assert done.returncode == 0, done.stdout[-5000:]
    weights = {
        run: tmp_path / run / f"hf/step_{MAX_STEPS:08d}/model.safetensors" for run in ("keep_killed", "keep", "drop")
    }
    assert weights["keep_killed"].read_bytes() == weights["keep"].read_bytes()
    base = load_file(tmp_path / "base" / "model.safetensors")
    for rule in ("keep", "drop"):
        found, expected = load_file(weights[rule]), train_plainly(tmp_path, rule)
        assert found.keys() == base.keys()
        for name in base:
            assert (found[name] - expected[name]).abs().max() < 2e-5, name
            trains = name.startswith(("model.layers.0.mlp.", "model.layers.2.", "model.norm."))
            assert torch.equal(found[name], base[name]) != trains, name
    assert not torch.equal(load_file(weights["keep"])[TOP], load_file(weights["drop"])[TOP])
    events = (tmp_path / "keep" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)[:2] for line in events] == [["plan_change", 4], ["plan_change", 7]]


TOP = "model.layers.2.mlp.up_proj.weight"


def make_plan_for(folder: Path, rule: str) -> Any:
    from layerplan.config.plan import ExplicitPlanConfig, PhaseConfig, SchedulePlanConfig
    from layerplan.models.files import identify_model, load_hf_config
    from layerplan.plan.decide import PlanContext, resolve_plan
    from layerplan.plan.model_shape import ModelShape

    base = str(folder / "base")
    config = SchedulePlanConfig(
        phases=[
            PhaseConfig(steps=4, plan=ExplicitPlanConfig(trainable=[2])),
            PhaseConfig(steps=3, plan=ExplicitPlanConfig(trainable=[0], modules=["mlp"], train_final_norm=True)),
            PhaseConfig(plan=ExplicitPlanConfig(trainable=[0, 2], modules=["mlp"])),
        ],
        optimizer_state=rule,  # type: ignore[arg-type]
        rewarm_steps=REWARM,
    )
    shape = ModelShape.from_hf_config(load_hf_config(base))
    return resolve_plan(config, PlanContext(identify_model(base), shape, make_train_config(), 32))


def make_train_config(rule: str = "keep") -> Any:
    """Two workers hold shards of the moments that are kept; one is enough where they are dropped."""
    from layerplan.config.train import OptimizerConfig, TrainConfig

    return TrainConfig(
        max_steps=MAX_STEPS,
        global_batch_size=4,
        micro_batch_size=1,
        num_workers=2 if rule == "keep" else 1,
        num_cpus_per_worker=0.5,
        compute_dtype="float32",
        parallelism="shard",
        log_every_steps=1,
        checkpoint_every_steps=3,
        validate_every_steps=5,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-5),
    )


def train_plainly(folder: Path, rule: str) -> Mapping[str, Any]:
    """One process, `torch.optim.AdamW` made anew at every change, moments moved by hand."""
    import torch
    from transformers import AutoModelForCausalLM

    from layerplan.corpus.stream import iter_rank_steps
    from layerplan.train.schedule import compute_lr_scale
    from layerplan.train.step import LossModel, make_batch

    config = make_train_config()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).train()
    parameters = dict(model.named_parameters())
    phases = {0: ("layers.2.",), 4: ("layers.0.mlp.", "model.norm."), 7: ("layers.0.mlp.", "layers.2.mlp.")}
    moments: dict[str, Any] = {}
    trained: list[str] = []
    optimizer: Any = None
    rows = iter_rank_steps(
        folder / "store", num_lanes=4, seed=0, rank=0, world_size=1, start_step=0, stop_step=MAX_STEPS
    )
    loss_model = LossModel(model)
    for step, batch_rows in enumerate(rows):
        if step in phases:
            started = step
            if trained:
                moments |= {name: optimizer.state[parameters[name]] for name in trained}
            before, trained = set(trained), [n for n in parameters if any(part in n for part in phases[step])]
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in trained)
            o = config.optimizer
            optimizer = torch.optim.AdamW(
                [
                    {"params": [parameters[name]], "weight_decay": o.weight_decay if parameters[name].ndim > 1 else 0.0}
                    for name in trained
                ],
                lr=1.0,
                betas=o.betas,
                eps=o.eps,
            )
            for name in trained:
                if name in moments and (name in before or rule == "keep"):
                    optimizer.state[parameters[name]] = moments[name]
        batch = make_batch(batch_rows, torch.device("cpu"))
        (loss_model(batch) / batch.num_labels).backward()
        torch.nn.utils.clip_grad_norm_([parameters[name] for name in trained], config.optimizer.max_grad_norm)
        rate = config.optimizer.learning_rate * compute_lr_scale(step, MAX_STEPS, config.schedule)
        rate *= min(1.0, (step - started + 1) / REWARM) if started else 1.0
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: parameter.detach() for name, parameter in parameters.items()}


@dataclass
class EventSink:
    """Writes events to a file; where that is wanted, asks for a stop and then kills the driver, once each."""

    folder: Path
    driver: int | None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        stopped, marker = self.folder / "stopped", self.folder / "killed"
        if self.driver is not None and step == PHASE_END - 1 and "train/loss" in metrics and not stopped.exists():
            stopped.touch()
            (self.folder / STOP_REQUEST).touch()
        if self.driver is not None and step == KILLED_AT and "train/loss" in metrics and not marker.exists():
            marker.touch()
            os.kill(self.driver, signal.SIGKILL)

    def log_event(self, name: str, step: int, message: str) -> None:
        with (self.folder / "events.jsonl").open("a") as handle:
            handle.write(json.dumps([name, step, message]) + "\n")

    def close(self) -> None: ...


def main() -> None:
    import ray

    from layerplan.config.cluster import ClusterConfig
    from layerplan.models.ref import ModelRef
    from layerplan.ray_session import connect
    from layerplan.train.trainer import TrainRequest, run_training

    folder, driver = Path(sys.argv[1]), os.getpid()
    connect(ClusterConfig(), min_cpus=1)
    for run in sys.argv[2:]:
        rule = run.partition("_")[0]
        plan, run_dir = make_plan_for(folder, rule), folder / run
        victim = driver if run.endswith("_killed") else None
        sink = lambda start, run_dir=run_dir, victim=victim: EventSink(run_dir, victim)  # noqa: E731
        result = run_training(
            TrainRequest(
                run_dir,
                ModelRef(str(folder / "base")),
                plan,
                folder / "store",
                make_train_config(rule),
                seed=0,
                sink_factory=sink,
            )
        )
        if result.stopped_early:
            print(f"stopped at step {result.final_step}", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
