"""A trial that an earlier job brought to its end tells again what it told, and trains nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from layerplan.config.plan import FreezeDeepPlanConfig, PlanOptions
from layerplan.config.sweep import SweepConfig
from layerplan.config.train import TrainConfig
from layerplan.models.ref import ModelRef
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.sweep.objective import Course, Replay, Trial, make_request
from layerplan.sweep.schedule import find_report_spacing
from layerplan.sweep.space import Point
from layerplan.train.held_out_rows import RowLosses, save_losses
from layerplan.train.judge import VALIDATION
from layerplan.train.request import Judging, TrainRequest, TrainResult
from layerplan.train.trial_record import TrialRecord, add_report, read_reports
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

PLAN = make_plan(
    FreezeDeepPlanConfig(boundary=1), model=QWEN3_0P6B_IDENTITY, shape=ModelShape.from_hf_config(QWEN3_0P6B)
)
TRIAL = Trial(Point(1, "deep", PlanOptions(), 3e-4, 5, "boundary_01"), PLAN, 8, 1e12, report_every=2)


def make_shared(folder: Path, metric: str = VALIDATION) -> TrainRequest:
    judging = Judging(metric, None, folder / "base.json", folder)
    config = TrainConfig(max_steps=1000, checkpoint_every_steps=500)
    return TrainRequest(folder, ModelRef("none"), PLAN, folder / "store", config, 0, judging=judging)


def leave_finished(folder: Path, losses: dict[str, RowLosses]) -> None:
    folder.mkdir()
    for step in (2, 4, 4, 6):
        add_report(folder, {"step": step, VALIDATION: 3 - step / 10, "train_loss": 2.0})
    with (folder / "reports.jsonl").open("a") as file:
        file.write('{"step": 7, "validation_')
    save_losses(folder / "row_losses.json", losses)
    done = folder / "checkpoints"
    TrainResult(8, done, 2.5, 1.5, 2.1, 64, 9.0, 1.0, 7.0, 0.1, 0, 0, {}, False, None).save(folder)


def refuse(*arguments: Any) -> None:
    raise AssertionError("a finished trial was trained again")


def hear(course: Course | Replay) -> list[dict[str, Any]]:
    told = [course.next()]
    while not told[-1]["done"]:
        told.append(course.next())
    return told


def test_a_finished_trial_reports_what_it_reported_and_then_its_result(tmp_path: Path) -> None:
    request = make_request(make_shared(tmp_path), TRIAL)
    leave_finished(request.run_dir, {"english": RowLosses(np.array([4.0, 8.0]), np.array([2, 2]))})
    told = hear(Course(TRIAL, request, refuse))
    assert [(each["step"], each["percent"], each["loss"]) for each in told] == [
        (2, 25.0, 2.8),
        (4, 50.0, 2.6),
        (6, 75.0, 2.4),
        (8, 100.0, 2.1),
    ]
    assert told[-1]["english"] == 3.0 and told[-1]["error"] == "" and told[-1]["tokens_per_s"] == 7.0
    assert len(read_reports(request.run_dir)) == 3, "a line that a kill cut short is none, and a step counts once"
    add_report(request.run_dir, {"step": 7, VALIDATION: 2.3})
    assert [each["step"] for each in read_reports(request.run_dir)] == [2, 4, 6, 7], "what follows it is whole"


def test_a_replay_ends_where_the_trial_ended(tmp_path: Path) -> None:
    """One that was stopped stays stopped, one that came to its end has its result."""
    request = make_request(make_shared(tmp_path), TRIAL)
    leave_finished(request.run_dir, {})
    values = {"name": "boundary_01", "boundary": 1, "max_steps": 8, "flops_share": 0.5, "validation_loss": 2.1}
    for step, expected in ((6, [2.8, 2.6, 2.4]), (8, [2.8, 2.6, 2.4, 2.1])):
        TrialRecord(step=step, loss=2.1, **values).save(request.run_dir)
        told = hear(Replay(request, TRIAL.steps))
        assert [each["loss"] for each in told] == expected
        assert told[-1]["percent"] == 100 * step / 8
    TrialRecord(step=4, loss=2.6, **values).save(request.run_dir)
    told = hear(Replay(request, TRIAL.steps))
    assert [each["loss"] for each in told] == [2.8, 2.6], (
        "what it measured before it heard that it was stopped decides nothing"
    )


def test_a_metric_that_was_not_measured_fails_the_trial_in_words(tmp_path: Path) -> None:
    request = make_request(make_shared(tmp_path, "english"), TRIAL)
    leave_finished(request.run_dir, {})
    (last,) = hear(Course(TRIAL, request, refuse))
    assert last["error"] == "english was never reported" and last["loss"] == math.inf


def test_a_fault_before_training_is_told(tmp_path: Path) -> None:
    (last,) = hear(Course(TRIAL, make_request(make_shared(tmp_path), TRIAL), refuse))
    assert last["done"] and str(tmp_path / "store") in last["error"]


def test_a_trial_has_its_own_rate_seed_steps_and_spacings(tmp_path: Path) -> None:
    request = make_request(make_shared(tmp_path), TRIAL)
    config = request.config
    assert (config.max_steps, config.optimizer.learning_rate, request.seed) == (8, 3e-4, 5)
    assert (config.checkpoint_every_steps, config.validate_every_steps) == (8, 2)
    assert request.run_dir == tmp_path / "boundary_01" and request.judging is not None
    assert request.judging.result == tmp_path / "boundary_01" / "row_losses.json"
    sweep = SweepConfig(boundaries=[1], scheduler="asha")
    assert [find_report_spacing(sweep, steps) for steps in (1, 8, 10, 100)] == [1, 2, 3, 25]
    assert find_report_spacing(SweepConfig(boundaries=[1]), 8) is None
