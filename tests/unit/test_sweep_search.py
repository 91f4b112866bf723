"""A sweep that goes on: new boundaries are tried, and what would change the trials that are there is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig, PlanOptions
from layerplan.config.sweep import SweepConfig
from layerplan.errors import ConfigError
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.sweep.objective import Trial
from layerplan.sweep.search import (
    check_judged_rows,
    check_plans,
    check_search,
    check_trained_rows,
    leave_out_other_rows,
    save_search,
)
from layerplan.sweep.space import Point
from layerplan.train.held_out_rows import RowLosses, hash_rows, save_losses
from layerplan.train.request import TrainResult
from layerplan.train.trial_record import TrialRecord
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY
from tests.tiny_loop import make_rows

SWEEP = SweepConfig(boundaries=[1], max_steps=4)
CORPUS = "c" * 64
ENDED = TrialRecord(name="boundary_01", boundary=1, step=4, max_steps=4, loss=2.0, flops_share=0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"boundaries": [1, 2]},
        {"boundaries": None, "split_ratios": [0.5]},
        {"max_concurrent_trials": 2},
        {"scheduler": "asha"},
        {"freeze": ["deep", "shallow"]},
        {"seeds": [1, 2]},
    ],
)
def test_what_does_not_decide_a_trial_may_change(tmp_path: Path, change: dict[str, object]) -> None:
    save_search(SWEEP, tmp_path, CORPUS)
    check_search(SWEEP.model_copy(update=change), tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"equal": "flops"}, r"sweep\.equal='flops': .* has trials with 'tokens'; choose another name"),
        ({"max_steps": 8}, r"sweep\.max_steps=8: .* has trials with 4"),
    ],
)
def test_what_decides_a_trial_is_refused_by_its_field(tmp_path: Path, change: dict[str, object], words: str) -> None:
    check_search(SWEEP, tmp_path / "nothing yet")
    save_search(SWEEP, tmp_path, CORPUS)
    check_search(SWEEP, tmp_path)
    with pytest.raises(ConfigError, match=words):
        check_search(SWEEP.model_copy(update=change), tmp_path)


def test_a_sweep_of_an_earlier_version_is_known_by_its_trials(tmp_path: Path) -> None:
    folder = tmp_path / "boundary_01"
    folder.mkdir()
    shape = ModelShape.from_hf_config(QWEN3_0P6B)
    make_plan(FreezeDeepPlanConfig(boundary=1), model=QWEN3_0P6B_IDENTITY, shape=shape).save(
        folder / "freeze_plan.json"
    )
    done = folder / "checkpoints"
    TrainResult(4, done, 2.0, 1.0, None, 64, 1.0, 1.0, 1.0, 0.1, 0, 0, {}, False, done).save(folder)
    check_search(SWEEP, tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_search(SweepConfig(boundaries=[1], equal="flops", max_steps=8), tmp_path)
    assert [fault.partition("=")[0] for fault in caught.value.faults] == ["sweep.max_steps", "sweep.equal"]


def test_a_name_that_an_older_version_gave_to_the_other_side_is_refused(tmp_path: Path) -> None:
    shape = ModelShape.from_hf_config(QWEN3_0P6B)
    deep, shallow = (
        make_plan(kind(boundary=1), model=QWEN3_0P6B_IDENTITY, shape=shape)
        for kind in (FreezeDeepPlanConfig, FreezeShallowPlanConfig)
    )
    point = Point(1, "deep", PlanOptions(), 1e-3, 0, "boundary_01")
    deep.save(tmp_path / "boundary_01" / "freeze_plan.json")
    check_plans([Trial(point, deep, 4, 1.0)], tmp_path)
    shallow.save(tmp_path / "boundary_01" / "freeze_plan.json")
    with pytest.raises(ConfigError, match=r"boundary_01 has a trial with another plan \(freeze_shallow, this one is"):
        check_plans([Trial(point, deep, 4, 1.0)], tmp_path)


def test_a_metric_that_trials_measured_on_other_rows_is_refused(tmp_path: Path) -> None:
    """Texts that nothing is ranked by may change; what was stopped before its end is known by the base beside it."""
    now, before = (make_rows(step, batch=2, vocab_size=16) for step in (1, 2))
    plan = make_plan(
        FreezeDeepPlanConfig(boundary=1), model=QWEN3_0P6B_IDENTITY, shape=ModelShape.from_hf_config(QWEN3_0P6B)
    )
    trial = Trial(Point(1, "deep", PlanOptions(), 1e-3, 0, "boundary_01"), plan, 4, 1.0)
    check_judged_rows("notes", {"notes": now}, tmp_path, [trial])
    for place in ("boundary_01", "base"):
        path = tmp_path / place / "row_losses.json"
        for rows in (before, now):
            save_losses(path, {"notes": RowLosses(np.ones(2), np.ones(2, dtype=np.int64), hash_rows(rows))})
            check_judged_rows("validation_loss", {"notes": now}, tmp_path, [trial])
            if rows is before:
                with pytest.raises(ConfigError, match=rf"sweep\.metric='notes': .*{place} was measured on other rows"):
                    check_judged_rows("notes", {"notes": now}, tmp_path, [trial])
        check_judged_rows("notes", {"notes": now}, tmp_path, [trial])


def test_a_store_that_was_built_anew_is_refused_once_a_trial_has_ended_on_the_earlier_one(tmp_path: Path) -> None:
    """At one address: nothing in the config says so, and trials would be ranked over two corpora."""
    check_trained_rows(CORPUS, tmp_path)
    save_search(SWEEP, tmp_path, CORPUS)
    check_trained_rows("d" * 64, tmp_path)
    (tmp_path / "boundary_01").mkdir()
    ENDED.save(tmp_path / "boundary_01")
    check_trained_rows(CORPUS, tmp_path)
    with pytest.raises(ConfigError, match=r"^corpus: .* has trials that ended on other rows than the store holds now"):
        check_trained_rows("d" * 64, tmp_path)
    (tmp_path / "search.json").write_text('{"max_steps": 4, "equal": "tokens"}', encoding="utf-8")
    check_trained_rows("d" * 64, tmp_path)


def test_losses_on_a_text_that_has_other_rows_now_stand_in_no_table(tmp_path: Path) -> None:
    before, now = (make_rows(step, batch=2, vocab_size=16) for step in (1, 2))
    (tmp_path / "boundary_01").mkdir()
    path = tmp_path / "boundary_01" / "row_losses.json"
    save_losses(path, {name: RowLosses(np.ones(2), np.ones(2, np.int64), hash_rows(before)) for name in ("a", "b")})
    record = ENDED.model_copy(update={"text_losses": {"a": 2.5, "b": 3.5, "no longer asked": 4.5}})
    found = leave_out_other_rows(record, {"a": now, "b": before}, tmp_path)
    assert found.text_losses == {"b": 3.5, "no longer asked": 4.5}
    stopped = record.model_copy(update={"name": "boundary_02"})
    assert leave_out_other_rows(stopped, {"a": now}, tmp_path) == stopped, (
        "judged by its metric alone, whose rows are fixed"
    )
