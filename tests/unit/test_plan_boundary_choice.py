"""From a measurement to a boundary: evidence, no evidence, a second try, and what is said about each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerplan.config.plan import (
    BoundaryOptions,
    BudgetPlanConfig,
    FilePlanConfig,
    FreezeDeepPlanConfig,
    FromProfilePlanConfig,
    FullPlanConfig,
    PhaseConfig,
    ReversePlanConfig,
    SchedulePlanConfig,
)
from layerplan.config.train import TrainConfig
from layerplan.errors import PlanError
from layerplan.plan.boundary_choice import choose_boundary, compute_vanished_share, find_options
from layerplan.plan.cost import predict_cost
from layerplan.plan.decide import PlanContext, resolve_plan
from layerplan.plan.describe import describe_certainty, describe_sensitivities, list_pairs
from layerplan.plan.explain import explain_plan
from layerplan.plan.layer_profile import LayerProfile
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan, predict_beside_full
from tests.layer_profiles import make_profile, make_step_profile
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

SHAPE = ModelShape.from_hf_config(QWEN3_0P6B)
MODEL = QWEN3_0P6B_IDENTITY


def make_noise_profile() -> LayerProfile:
    rng = np.random.default_rng(4)
    return make_profile(MODEL, rng.random(28).tolist(), rng.random(27).tolist())


def plan_of(config: Any, profile: LayerProfile):
    return make_plan(config, model=MODEL, shape=SHAPE, profile=profile)


def test_a_clear_step_decides_and_the_plan_carries_its_evidence() -> None:
    profile = make_step_profile(MODEL, 9)
    plan = plan_of(FromProfilePlanConfig(), profile)
    assert plan.trainable_layers == tuple(range(9))
    found = plan.evidence["boundary"]
    assert (found["rule"], found["sensitivity"], found["decided_by"]) == ("change_point", "relative", "evidence")
    assert found["p_value"] == max(found["shift_p"], found["block_p"]) < 0.01
    assert found["boundary_range"] == [9, 9] and len(found["alignment_score"]) == 26
    assert plan.reason.startswith("Boundary 9 is supported by the measurement (p = 0.00")
    assert "it may lie from 9 to 9" in plan.reason and "the deep side freezes" in plan.reason
    text = explain_plan(plan, profile)
    assert "Layers in other orders reach its score with p = 0.00" in text
    # at 1/3, 1/2 and 2/3 of 28 layers the paper's boundaries are 9, 14 and 19
    scores = profile.alignment_score
    assert f"1/3 {scores[8]:+.3f}, 1/2 {scores[13]:+.3f}, 2/3 {scores[18]:+.3f}" in text


def test_noise_decides_nothing_and_one_sentence_says_so() -> None:
    profile = make_noise_profile()
    plan = plan_of(FromProfilePlanConfig(), profile)
    assert plan.trainable_layers == tuple(range(14))
    best = plan.evidence["boundary"]["best_boundary"]
    assert plan.evidence["boundary"]["decided_by"] == "midpoint" and best != 14
    assert plan.reason.startswith(
        f"Boundary 14 is the middle, because the measurement supports no boundary (the best is {best},"
    )
    shallow = plan_of(FromProfilePlanConfig(freeze="shallow"), profile)
    assert shallow.trainable_layers == tuple(range(14, 28))
    assert plan_of(ReversePlanConfig(), profile).trainable_layers == tuple(range(14, 28))
    assert plan_of(ReversePlanConfig(without_evidence="best"), profile).trainable_layers == tuple(range(28 - best, 28))


def test_without_evidence_the_best_boundary_or_an_error_can_be_had() -> None:
    profile = make_noise_profile()
    plan = plan_of(FromProfilePlanConfig(without_evidence="best"), profile)
    best = plan.evidence["boundary"]["best_boundary"]
    assert plan.trainable_layers == tuple(range(best))
    assert f"Boundary {best} is the best of the change_point rule, relative sensitivity and no more" in plan.reason
    with pytest.raises(
        PlanError, match=r"plan.without_evidence=error: the measurement supports no boundary .* set midp"
    ):
        plan_of(FromProfilePlanConfig(without_evidence="error"), profile)
    assert plan_of(FromProfilePlanConfig(without_evidence="error"), make_step_profile(MODEL, 9)).trainable_layers


@pytest.mark.parametrize(("min_side", "words"), [(15, r"plan.min_side=15: must lie in 1..14 for a model of 28 layers")])
def test_a_side_larger_than_half_of_the_model_is_refused(min_side: int, words: str) -> None:
    for config in (FromProfilePlanConfig(min_side=min_side), BudgetPlanConfig(min_side=min_side, max_flops_share=1)):
        with pytest.raises(PlanError, match=words):
            resolve_plan(config, PlanContext(MODEL, SHAPE, TrainConfig(), 128, make_noise_profile()))


def test_the_smallest_models_have_no_boundary_to_support() -> None:
    for num_layers in (2, 3):
        model = MODEL.model_copy(update={"num_layers": num_layers})
        particle, sensitivity = [0.0] * (num_layers - 1) + [1.0], [1.0] + [0.0] * (num_layers - 2)
        profile = make_profile(model, particle, sensitivity)
        choice = choose_boundary(profile)
        assert (choice.best_boundary, choice.boundary, choice.decided_by) == (None, 1, "midpoint")
        assert "too few layers" in " ".join(describe_certainty(profile))
        with pytest.raises(PlanError, match=f"{num_layers} layers leave no boundary with plan.min_side=2"):
            choose_boundary(profile, BoundaryOptions(without_evidence="best"))


def test_a_choice_that_is_not_the_default_counts_as_a_second_try() -> None:
    rng = np.random.default_rng(9)
    is_deep = np.arange(28) >= 12
    particle = is_deep + rng.normal(size=28)
    profile = make_profile(
        MODEL,
        particle.tolist(),
        rng.random(27).tolist(),
        absolute_sensitivity=[*(~is_deep[:-1] + rng.random(27)).tolist(), 0.0],
        options={"sensitivity": "absolute"},
    )
    choice = choose_boundary(profile)
    own, default = choice.tried["absolute, change_point"], choice.tried["relative, change_point"]
    assert own < default and own == max(choice.shift_p, choice.block_p)
    assert choice.p_value == min(1.0, 2 * own), "Holm: the smaller of two counts twice"
    assert "corrected for two tries" in " ".join(describe_certainty(profile, choice))
    plain = choose_boundary(profile.model_copy(update={"options": {}}))
    assert plain.p_value == default == choice.tried["relative, change_point"]


def test_every_sensitivity_and_rule_is_listed_with_its_own_boundary_and_p() -> None:
    is_deep = np.arange(28) >= 10
    absolute = [*(np.arange(27) < 20).astype(float).tolist(), 0.0]
    profile = make_profile(
        MODEL, is_deep.astype(float).tolist(), (~is_deep[:-1]).astype(float).tolist(), absolute_sensitivity=absolute
    )
    rows = list_pairs(profile, 2)
    assert [row[:2] for row in rows] == [
        [kind, rule] for kind in ("relative", "absolute") for rule in ("change_point", "paper")
    ]
    assert rows[0][2] == "10" and rows[2][2] != "10"
    assert all(float(row[4]) >= float(row[3]) for row in rows)
    assert "| relative | change_point | 10 | 0.00" in explain_plan(plan_of(FullPlanConfig(), profile), profile)


def test_the_share_of_relative_sensitivity_from_where_nothing_is_left_by_hand() -> None:
    model = MODEL.model_copy(update={"num_layers": 4})
    # JS(0..4); LS(3) divides by JS(2) = 0.02 < 5 % of 0.5, the others by 0.5 and 0.4
    profile = make_profile(model, [0.0, 0.0, 1.0, 1.0], [0.2, 0.95, 1.85], js=[0.5, 0.4, 0.02, 0.01, 0.0])
    assert compute_vanished_share(profile) == pytest.approx(1.85 / 3.0)
    assert "62% of it comes from layers" in describe_sensitivities(profile)[0]
    assert len(describe_sensitivities(profile)) == 2


def test_options_are_those_of_the_plan_or_of_its_first_phase_that_has_any() -> None:
    own = FromProfilePlanConfig(rule="paper")
    phases = [PhaseConfig(steps=3, plan=FreezeDeepPlanConfig(boundary=3)), PhaseConfig(plan=own)]
    assert find_options(own).rule == find_options(SchedulePlanConfig(phases=phases)).rule == "paper"
    assert find_options(FullPlanConfig()).rule == "change_point"


def test_a_budget_without_evidence_stays_near_the_middle_and_says_so() -> None:
    rng, model = np.random.default_rng(4), MODEL.model_copy(update={"num_layers": 10})
    shape = ModelShape.from_hf_config({**QWEN3_0P6B, "num_hidden_layers": 10, "layer_types": ["full_attention"] * 10})

    def search(particle: list[float], sensitivity: list[float], **options: Any):
        config = BudgetPlanConfig(max_flops_share=0.97, **options)
        profile = make_profile(model, particle, sensitivity)
        return resolve_plan(config, PlanContext(model, shape, TrainConfig(max_steps=10), 512, profile))

    noise = rng.random(10).tolist(), rng.random(9).tolist()
    plan = search(*noise)
    assert plan.trainable_layers == tuple(range(5))
    assert "is nearest to the middle, because the measurement supports no boundary within the limits" in plan.reason
    best = search(*noise, without_evidence="best")
    assert "has the best score" in best.reason and "no evidence" in best.reason
    with pytest.raises(PlanError, match=r"plan.without_evidence=error: the measurement supports no boundary"):
        search(*noise, without_evidence="error")
    assert search([0.0] * 4 + [1.0] * 6, [1.0] * 4 + [0.0] * 5).trainable_layers == tuple(range(4))
    turned = search([1.0] * 4 + [0.0] * 6, [0.0] * 4 + [1.0] * 5)
    assert turned.trainable_layers == tuple(range(4, 10)), "the opposite pattern supports freezing the shallow side"


def test_the_cost_is_that_of_the_runs_own_rows_and_of_both_when_a_plan_travels(tmp_path: Path) -> None:
    config = FreezeDeepPlanConfig(boundary=14)
    here = PlanContext(MODEL, SHAPE, TrainConfig(), 256)
    plan = resolve_plan(config, here)
    assert plan.predicted_cost is not None and plan.predicted_cost.seq_len == 256
    assert plan.predicted_cost.plan == predict_cost(plan, SHAPE, seq_len=256)
    assert "GFLOP per token in rows of 256 tokens" in explain_plan(plan)
    plan.save(tmp_path / "plan.json")
    there = resolve_plan(
        FilePlanConfig(path=str(tmp_path / "plan.json")), PlanContext(MODEL, SHAPE, TrainConfig(), 4096)
    )
    assert there.sha256 == plan.sha256, "a plan that travels stays the plan it is"
    text = explain_plan(there, cost_here=predict_beside_full(there, SHAPE, 4096))
    assert "in rows of 256 tokens" in text and "in this run" in text and "in rows of 4,096 tokens" in text
    rotated = resolve_plan(SchedulePlanConfig(phases=[PhaseConfig(plan=config)]), here)
    assert rotated.predicted_cost is not None and rotated.predicted_cost.seq_len == 256
