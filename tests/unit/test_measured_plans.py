"""Plans made of measurements: what trains, what they keep of the evidence, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from layerplan.config.measure import MeasureConfig
from layerplan.config.plan import MeasuredPlanConfig, PhaseConfig, SchedulePlanConfig
from layerplan.errors import PlanError
from layerplan.measure.work import list_pieces
from layerplan.plan.decide import list_measurements
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_measurement import LayerMeasurement, LayerMeasurements, MeasuringCost
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.report.measurements import render_measurements
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

SHAPE = ModelShape.from_hf_config(QWEN3_0P6B)
MODEL = QWEN3_0P6B_IDENTITY
COST = MeasuringCost(seconds=12.5, flops=3e12, tokens=2048)


def make_measurements(values: list[float], noise: float = 0.1, name: str = "fisher") -> LayerMeasurements:
    """Six repeats of the values with a little noise."""
    rng = np.random.default_rng(4)
    repeats = (np.array(values) + noise * rng.normal(size=(6, len(values)))).tolist()
    measurement = LayerMeasurement(name=name, values=values, repeats=repeats, repeated_over="rows of text", cost=COST)
    return LayerMeasurements(model=MODEL, measurements=[measurement]).sealed()


LEADING = [1.0 if layer in (3, 9, 20, 27) else 0.0 for layer in range(28)]


def plan_of(measurements: LayerMeasurements | None, **fields: Any) -> FreezePlan:
    config = MeasuredPlanConfig(**{"type": "fisher", **fields})
    return make_plan(config, model=MODEL, shape=SHAPE, measurements=measurements, seq_len=512)


def test_the_layers_with_the_largest_values_train_and_the_plan_keeps_why():
    measurements = make_measurements(LEADING)
    plan = plan_of(measurements, k=4)
    assert plan.trainable_layers == (3, 9, 20, 27) and plan.plan_type == "fisher"
    kept = plan.evidence["measurement"]
    assert kept["sha256"] == measurements.find("fisher").sha256 and kept["values"] == LEADING
    assert kept["cost"] == {"seconds": 12.5, "flops": 3e12, "tokens": 2048} and kept["top_p"] == 0.001
    assert "p = 0.001" in plan.reason and plan.predicted_cost is not None


def test_the_other_end_is_a_control():
    assert set(plan_of(make_measurements(LEADING), k=24, end="worst").trainable_layers) == set(range(28)) - {
        3,
        9,
        20,
        27,
    }


def test_as_many_layers_train_as_the_flops_allow():
    plan = plan_of(make_measurements([float(layer) for layer in range(28)]), max_flops_share=0.6)
    more = plan_of(make_measurements([float(layer) for layer in range(28)]), k=len(plan.trainable_layers) + 1)
    assert plan.predicted_cost is not None and more.predicted_cost is not None
    assert plan.predicted_cost.flops_share <= 0.6 < more.predicted_cost.flops_share


def test_one_side_of_a_step_trains():
    stepped = make_measurements([0.2] * 10 + [1.0] * 18, noise=0.0)
    plan = plan_of(stepped, select="boundary")
    assert plan.trainable_layers == tuple(range(10, 28))
    assert plan.evidence["measurement"]["step"]["boundary"] == 10
    assert plan_of(stepped, select="boundary", end="worst").trainable_layers == tuple(range(10))


def test_a_measurement_is_the_same_whatever_it_cost():
    first = make_measurements(LEADING).measurements[0]
    again = first.model_copy(update={"cost": MeasuringCost(seconds=99.0, flops=1.0, tokens=1)})
    assert first.sha256 == again.sha256 != first.model_copy(update={"values": [0.0] * 28}).sha256


def test_measurements_on_disk_are_sealed(tmp_path: Path):
    path = tmp_path / "layer_measurements.json"
    make_measurements(LEADING).save(path)
    assert LayerMeasurements.load(path).find("fisher").values == LEADING
    path.write_text(path.read_text().replace("12.5", "12.6"))
    with pytest.raises(PlanError, match="changed after it was made"):
        LayerMeasurements.load(path)


@pytest.mark.parametrize(
    ("measurements", "fields", "words"),
    [
        (None, {"k": 4}, "plan.type=fisher: needs layer measurements"),
        (make_measurements(LEADING, name="pilot"), {"k": 4}, "the measurements at hand are pilot"),
        (make_measurements(LEADING), {"k": 29}, r"plan.k=29: must lie in 1\.\.28"),
        (make_measurements(LEADING), {"max_flops_share": 0.01}, "alone costs"),
        (make_measurements(LEADING), {"select": "boundary", "min_side": 15}, "plan.min_side=15"),
        (
            make_measurements([0.0] * 28, noise=1.0),
            {"k": 4, "without_evidence": "error"},
            "repeats of fisher do not agree",
        ),
    ],
)
def test_what_no_plan_can_be_made_of_is_told_in_one_line(measurements: Any, fields: dict[str, Any], words: str):
    with pytest.raises(PlanError, match=words):
        plan_of(measurements, **fields)


@pytest.mark.parametrize("fields", [{}, {"k": 2, "max_flops_share": 0.5}, {"select": "boundary", "k": 2}])
def test_a_config_gives_one_number_of_layers(fields: dict[str, Any]):
    with pytest.raises(ValidationError, match="k"):
        MeasuredPlanConfig(type="pilot", **fields)


def test_measurements_of_another_model_are_refused():
    short = LayerMeasurement(name="fisher", values=[1.0, 2.0], cost=COST)
    other = LayerMeasurements(model=MODEL.model_copy(update={"num_layers": 2}), measurements=[short])
    with pytest.raises(PlanError, match="with 2 layers"):
        plan_of(other, k=1)


def test_what_the_phases_of_a_schedule_read_is_measured_once():
    phases = [{"steps": 2, "plan": {"type": "pilot", "k": 3}}, {"plan": {"type": "pilot", "k": 5}}]
    assert list_measurements(SchedulePlanConfig(phases=[PhaseConfig(**phase) for phase in phases])) == ["pilot"]


def test_every_piece_of_work_has_a_name_of_its_own():
    pieces = list_pieces(["pilot", "fisher", "tuned_lens_gain"], MeasureConfig(num_rows=3), [], range(3, 19))
    assert [piece.key for piece in pieces] == [
        "pilot/0", "tuned_lens_gain/0", "tuned_lens_gain/1", "fisher/0", "fisher/1", "fisher/2"
    ]  # fmt: skip
    assert pieces[0].rows == tuple(range(3, 19)) and pieces[4].rows == (1,)


def test_the_table_corrects_its_tests_for_their_number():
    fisher, pilot = make_measurements(LEADING).measurements[0], make_measurements(LEADING, name="pilot").measurements[0]
    table = render_measurements(LayerMeasurements(model=MODEL, measurements=[fisher, pilot]), SHAPE, seq_len=512)
    (row,) = [line for line in table.splitlines() if line.startswith("| fisher | 3, 9, 20, 27, 0 |")]
    assert "| 6 rows of text | 12 | 3.00 |" in row
    assert "| fisher | +1.00 | +1.00 |" in table
