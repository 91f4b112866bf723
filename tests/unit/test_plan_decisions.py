"""Plans under limits and plans that change: what the search finds, what a naive search finds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive_boundary
import pytest
from pydantic import ValidationError

from layerplan.config.plan import (
    BudgetPlanConfig,
    FilePlanConfig,
    FreezeDeepPlanConfig,
    FreezeShallowPlanConfig,
    FullPlanConfig,
    PhaseConfig,
    RotationPlanConfig,
    SampleBudgetPlanConfig,
    SchedulePlanConfig,
)
from layerplan.config.train import TrainConfig
from layerplan.errors import PlanError
from layerplan.plan.cost import count_trainable_params, predict_cost
from layerplan.plan.decide import PlanContext, resolve_plan
from layerplan.plan.explain import explain_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile
from layerplan.plan.memory import choose_placement, choose_placements
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan, make_plan
from layerplan.plan.sample_budget import allocate_start_layers
from tests.layer_profiles import make_step_profile
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

SHAPE = ModelShape.from_hf_config(QWEN3_0P6B)
MODEL = QWEN3_0P6B_IDENTITY
TRAIN = TrainConfig(max_steps=100, global_batch_size=8, micro_batch_size=1, num_workers=8, use_gpu=True)


def make_profile() -> LayerProfile:
    """A clear step at 20: freezing deep from there is supported, freezing shallow the opposite."""
    return make_step_profile(MODEL, 20)


def context(profile: LayerProfile | None = None, **train: Any) -> PlanContext:
    return PlanContext(MODEL, SHAPE, TrainConfig(**{**TRAIN.model_dump(), **train}), 4096, profile)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.6, 0.5])
def test_a_budgeted_plan_is_the_best_a_plain_search_finds(share: float) -> None:
    profile = make_profile()
    plan = resolve_plan(BudgetPlanConfig(max_flops_share=share), context(profile))
    full = predict_cost(make_full_plan(MODEL, SHAPE), SHAPE, seq_len=4096).total_flops
    rated = naive_boundary.rate(profile.task_particle, profile.layer_sensitivity, "change_point", 2)
    fits = [
        boundary
        for boundary in rated
        if predict_cost(
            make_plan(FreezeDeepPlanConfig(boundary=boundary), model=MODEL, shape=SHAPE), SHAPE, seq_len=4096
        ).total_flops
        <= share * full
    ]
    assert predict_cost(plan, SHAPE, seq_len=4096).total_flops / full <= share
    if fits:
        assert plan.trainable_layers == tuple(range(max(fits, key=lambda boundary: rated[boundary])))
    else:  # no plan of the supported side fits: the one nearest to the middle that does
        assert plan.trainable_layers[-1] == 27 and "supports no boundary within the limits" in plan.reason
    front = [row for row in plan.evidence["pareto"] if row["side"] == "freeze_deep" or not row["chosen"]]
    assert [row["score"] for row in front] == sorted(row["score"] for row in front)
    assert [row["flops_share"] for row in front] == sorted(row["flops_share"] for row in front)
    assert "| within limits |" in explain_plan(plan, profile)


def test_every_limit_counts_and_what_nothing_keeps_names_the_cheapest() -> None:
    profile = make_profile()
    lean = resolve_plan(BudgetPlanConfig(max_flops_share=0.95, max_memory_gib=22), context(profile))
    rich = resolve_plan(BudgetPlanConfig(max_flops_share=0.95, max_memory_gib=60), context(profile))
    assert (
        predict_cost(lean, SHAPE, seq_len=4096).trainable_params
        <= predict_cost(rich, SHAPE, seq_len=4096).trainable_params
    )
    with pytest.raises(
        PlanError, match=r"no plan keeps max_flops_share=0.3; the cheapest is freeze_shallow at boundary 27"
    ):
        resolve_plan(BudgetPlanConfig(max_flops_share=0.3), context(profile))
    with pytest.raises(PlanError, match=r"no plan keeps max_worker_hours=1e-06 worker hours"):
        resolve_plan(BudgetPlanConfig(max_worker_hours=1e-6), context(profile))
    with pytest.raises(PlanError, match=r"plan.type=budget: needs a layer profile"):
        resolve_plan(BudgetPlanConfig(max_flops_share=0.5), context())
    with pytest.raises(ValidationError, match="give at least one of max_flops_share"):
        BudgetPlanConfig()


def test_phases_follow_each_other_and_the_plan_names_all_that_trains(tmp_path: Path) -> None:
    config = SchedulePlanConfig(
        phases=[
            PhaseConfig(steps=30, plan=FreezeShallowPlanConfig(boundary=20)),
            PhaseConfig(steps=10, plan=FreezeDeepPlanConfig(boundary=4, train_final_norm=True)),
            PhaseConfig(plan=FreezeShallowPlanConfig(boundary=26)),
        ]
    )
    plan = resolve_plan(config, context())
    plan.save(tmp_path / "plan.json")
    assert FreezePlan.load(tmp_path / "plan.json") == plan
    assert resolve_plan(FilePlanConfig(path=str(tmp_path / "plan.json")), context()) == plan
    assert plan.trainable_layers == (*range(4), *range(20, 28)) and plan.train_final_norm
    assert [plan.at_step(step).trainable_layers[0] for step in (0, 29, 30, 39, 40, 99)] == [20, 20, 0, 0, 26, 26]
    assert [plan.next_change(step) for step in (0, 29, 30, 40, 99)] == [30, 30, 40, None, None]
    parts = [(30, FreezeShallowPlanConfig(boundary=20)), (10, FreezeDeepPlanConfig(boundary=4, train_final_norm=True))]
    parts.append((60, FreezeShallowPlanConfig(boundary=26)))
    flops = [
        steps * predict_cost(make_plan(part, model=MODEL, shape=SHAPE), SHAPE, seq_len=4096).total_flops
        for steps, part in parts
    ]
    assert predict_cost(plan, SHAPE, seq_len=4096).total_flops == pytest.approx(sum(flops) / 100)
    assert "| 30 | freeze_deep | 0-3 | frozen | trains | frozen |" in explain_plan(plan)


def test_a_rotation_draws_k_layers_a_period_from_its_seed() -> None:
    plan = resolve_plan(RotationPlanConfig(k=3, period_steps=20, seed=5, tied="trained"), context())
    assert [phase.start_step for phase in plan.phases] == [0, 20, 40, 60, 80]
    assert all(len(phase.trainable_layers) == 3 and phase.train_embeddings for phase in plan.phases)
    assert len({phase.trainable_layers for phase in plan.phases}) > 1
    assert plan == resolve_plan(RotationPlanConfig(k=3, period_steps=20, seed=5, tied="trained"), context())


@pytest.mark.parametrize("budget", ["half", "geometric", "arithmetic"])
def test_a_sample_budget_gives_every_start_layer_its_rows(budget: Any) -> None:
    steps = 1000
    plan = resolve_plan(SampleBudgetPlanConfig(budget=budget), context(max_steps=steps))
    counts = allocate_start_layers(steps * 8, 28, budget, "depth_first")
    starts = [plan.at_step(step).trainable_layers[0] for step in range(steps)]
    assert starts == sorted(starts) and plan.trainable_layers == tuple(range(28))
    for layer, count in enumerate(counts):
        assert abs(starts.count(layer) - count / 8) <= 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SchedulePlanConfig(phases=[PhaseConfig(steps=40, plan=FullPlanConfig())]), "end at step 40, before"),
        (
            SchedulePlanConfig(
                phases=[PhaseConfig(steps=100, plan=FullPlanConfig()), PhaseConfig(plan=FullPlanConfig())]
            ),
            "phase 1 would start at step 100, but train.max_steps=100",
        ),
        (RotationPlanConfig(k=29, period_steps=5), r"plan.k=29: must lie in 1..28"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(config: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        resolve_plan(config, context())
    with pytest.raises(ValidationError, match=r"phases.0.steps is missing"):
        SchedulePlanConfig(phases=[PhaseConfig(plan=FullPlanConfig()), PhaseConfig(plan=FullPlanConfig())])


def test_a_schedule_is_priced_by_its_largest_phase_and_its_checkpoints_by_all_of_them() -> None:
    """Only the last layer first, then everything: 9 GiB would be a promise that the second phase breaks."""
    phases = [
        PhaseConfig(steps=50, plan=FreezeShallowPlanConfig(boundary=27)),
        PhaseConfig(plan=FullPlanConfig()),
    ]
    limits = {"seq_len": 512, "world_size": 1, "device_type": "cuda", "available_bytes": 1e15}
    small = resolve_plan(phases[0].plan, context())
    for rule in ("drop", "keep"):
        plan = resolve_plan(SchedulePlanConfig(phases=phases, optimizer_state=rule), context())  # type: ignore[arg-type]
        chosen = choose_placements(plan, SHAPE, TRAIN, **limits)
        assert chosen.start_step == 50
        _, estimate = choose_placement(make_full_plan(MODEL, SHAPE), SHAPE, TRAIN, **limits)
        assert chosen.estimate == estimate
        frozen_first = SHAPE.total_params - count_trainable_params(small, SHAPE)
        assert chosen.parked_bytes == frozen_first * (12 if rule == "keep" else 4)
        cost = predict_cost(plan, SHAPE, seq_len=512)
        assert cost.trainable_params == SHAPE.total_params
        assert cost.checkpoint_bytes == 12 * SHAPE.total_params
    rotation = resolve_plan(RotationPlanConfig(k=2, period_steps=1), context())
    layer = SHAPE.layer_params(0)
    assert predict_cost(rotation, SHAPE, seq_len=512).checkpoint_bytes == 28 * 4 * layer + 2 * 8 * layer
    unchanged = choose_placements(small, SHAPE, TRAIN, **limits)
    assert (unchanged.start_step, unchanged.parked_bytes) == (0, 0)


def test_the_chosen_plan_stands_in_its_own_table_and_is_the_cheapest_of_its_score() -> None:
    plan = resolve_plan(BudgetPlanConfig(max_flops_share=0.95), context(make_profile()))
    (row,) = [row for row in plan.evidence["pareto"] if row["chosen"]]
    assert (row["side"], row["boundary"], row["ends"]) == ("freeze_deep", 20, "none")
    assert not plan.train_lm_head and not plan.train_embeddings
    assert explain_plan(plan).count("**chosen**") == 1
    seq_len = context().seq_len
    full = predict_cost(make_full_plan(MODEL, SHAPE), SHAPE, seq_len=seq_len).total_flops
    assert row["flops_share"] == pytest.approx(predict_cost(plan, SHAPE, seq_len=seq_len).total_flops / full)


def test_a_phased_plan_is_refused_for_a_run_of_another_length(tmp_path: Path) -> None:
    plan = resolve_plan(RotationPlanConfig(k=2, period_steps=10), context())
    plan.save(tmp_path / "plan.json")
    config = FilePlanConfig(path=str(tmp_path / "plan.json"))
    assert resolve_plan(config, context()).sha256 == plan.sha256
    with pytest.raises(PlanError, match=r"its phases were made for 100 steps, but train\.max_steps=50"):
        resolve_plan(config, context(max_steps=50))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_lm_head": True}, "a phase has train_lm_head=true, the plan itself train_lm_head=false"),
        ({"train_embeddings": True}, "a phase has train_embeddings=true"),
        ({"tied": "head_only"}, "a phase has tied='head_only', the plan itself tied='frozen'"),
        ({"plan_type": "full"}, "a phase trains everything"),
    ],
)
def test_a_phase_cannot_train_what_the_plan_calls_frozen(change: dict[str, Any], words: str) -> None:
    values = resolve_plan(RotationPlanConfig(k=2, period_steps=50), context()).model_dump()
    values["phases"] = [values["phases"][0], values["phases"][1] | change]
    with pytest.raises(ValidationError, match=words):
        FreezePlan.model_validate(values)
