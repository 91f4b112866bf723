"""A run that is given more steps follows the old schedule up to where it stands and the new one from there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from layerplan.config.load import load_config
from layerplan.config.plan import ExplicitPlanConfig
from layerplan.config.train import OptimizerConfig, ScheduleConfig, TrainConfig
from layerplan.errors import ConfigError, PlanError
from layerplan.pipeline.run_folder import open_run_folder
from layerplan.plan.decide import check_planned_steps
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train.horizon import extend_horizon
from layerplan.train.loop import run_loop
from layerplan.train.state import TrainState
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_loop import Sink, make_loop, make_rows

PEAK = 1e-2


def config_of(steps: int) -> TrainConfig:
    """Cosine without a warm-up: rate(index) = peak / 2 * (1 + cos(pi * index / (steps - 1)))."""
    return TrainConfig(
        max_steps=steps,
        global_batch_size=2,
        micro_batch_size=2,
        compute_dtype="float32",
        log_every_steps=1,
        schedule=ScheduleConfig(type="cosine", warmup_ratio=0.0),
        optimizer=OptimizerConfig(learning_rate=PEAK),
    )


def plan() -> FreezePlan:
    model = ModelIdentity(name="tiny", model_type="qwen3", num_layers=3)
    return make_plan(ExplicitPlanConfig(trainable=[1, 2]), model=model, shape=ModelShape.from_hf_config(TINY_QWEN3))


def train(*horizons: int) -> tuple[Sink, TrainState, list[str]]:
    """Trains one model to the end of each horizon in turn."""
    sink, said, state = Sink(), [], TrainState()
    setup, hooks = make_loop(
        build_tiny_qwen3(),
        plan(),
        config_of(horizons[0]),
        rows_of_step=lambda step: make_rows(step, batch=2, vocab_size=40),
        sink=sink,
    )
    for steps in horizons:
        state, line = extend_horizon(state, config_of(steps), None)
        said += [line] if line else []
        state = run_loop(replace(setup, config=config_of(steps)), state, hooks)
    return sink, state, said


def test_the_rates_are_those_of_six_steps_up_to_the_sixth_and_then_those_of_ten() -> None:
    sink, state, said = train(6, 10)
    cosine = [PEAK / 2 * (1 + math.cos(math.pi * index / (of - 1))) for index, of in enumerate([6] * 6 + [10] * 4)]
    assert [sink.metrics[step]["train/learning_rate"] for step in range(1, 11)] == pytest.approx(cosine)
    assert state.step == 10 and state.horizons == ((0, 6), (6, 10))
    assert said == [
        "train.max_steps is 10, it was 6: up to step 6 the learning rate followed the cosine schedule of 6 steps, from"
        " step 7 on it follows that of 10: 0 at step 6, 0.0025 at step 7"
    ]


def test_a_state_that_does_not_know_its_horizon_is_told_by_the_result_of_the_run() -> None:
    old = TrainState(step=6)
    assert "it was 6" in extend_horizon(old, config_of(10), 6)[1]
    assert extend_horizon(old, config_of(10), None)[1] == "", "an interrupted run of before: nothing is known to change"
    assert extend_horizon(TrainState(), config_of(10), None)[1] == ""


def submit(folder: Path, steps: int) -> int:
    config = folder / "config.yaml"
    config.write_text(
        json.dumps({"name": "r", "storage_path": str(folder), "model": {"type": "scratch"}, "corpus": {"seq_len": 64}})
    )
    opened = open_run_folder(load_config(str(config), [f"train.max_steps={steps}"]))
    return int(json.loads(opened.config.read_text())["train"]["max_steps"])


def test_a_run_can_be_given_more_steps_and_not_fewer(tmp_path: Path) -> None:
    assert [submit(tmp_path, 6), submit(tmp_path, 10), submit(tmp_path, 10)] == [6, 10, 10]
    with pytest.raises(
        ConfigError, match=r"train.max_steps=6: run 'r' was given 10 steps and can be given more"
    ) as got:
        submit(tmp_path, 6)
    assert len(got.value.faults) == 1


def test_phases_that_were_made_for_fewer_steps_are_not_stretched() -> None:
    phased = plan().model_copy(update={"phases": (object(),), "planned_steps": 6})
    with pytest.raises(PlanError, match=r"made for 6 steps, but train.max_steps=10"):
        check_planned_steps(phased, 10, Path("freeze_plan.json"))
    check_planned_steps(phased, 6, Path("freeze_plan.json"))
    check_planned_steps(plan(), 10, Path("freeze_plan.json"))
