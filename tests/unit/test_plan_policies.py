"""Plans: what each policy trains, what contradicts itself, what is noticed on disk, and what a plan costs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from layerplan.config.plan import (
    ExplicitPlanConfig,
    FreezeDeepPlanConfig,
    FreezeShallowPlanConfig,
    FromProfilePlanConfig,
    FullPlanConfig,
    MidpointPlanConfig,
    RandomPlanConfig,
    ReversePlanConfig,
    SemanticPlanConfig,
    SpreadPlanConfig,
    TopKSensitivityPlanConfig,
)
from layerplan.errors import PlanError
from layerplan.plan.cost import explain_cost, predict_cost
from layerplan.plan.explain import explain_plan, render_layer_map
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile, SemanticProfile
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan, make_plan
from tests.layer_profiles import make_profile
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

SHAPE = ModelShape.from_hf_config(QWEN3_0P6B)
MODEL = QWEN3_0P6B_IDENTITY


@pytest.fixture
def profile() -> LayerProfile:
    """A clear step at 5; the three most sensitive layers are 0, 1 and 2."""
    return make_profile(
        MODEL,
        [0.0] * 5 + [1.0] * 23,
        [5.0, 4.8, 4.6, 4.4, 4.2] + [0.0] * 22,
        semantic={"cosine": SemanticProfile(deviation=[0.0] * 29, gain=[0.0] * 28, eof_layer=20)},
    )


def layers_of(config: Any, profile: LayerProfile | None = None) -> tuple[int, ...]:
    return make_plan(config, model=MODEL, shape=SHAPE, profile=profile).trainable_layers


def test_each_policy_trains_the_layers_it_names(profile: LayerProfile):
    assert layers_of(FullPlanConfig()) == tuple(range(28))
    assert layers_of(FreezeDeepPlanConfig(split_ratio=1 / 3)) == tuple(range(9))
    assert layers_of(FreezeShallowPlanConfig(boundary=19)) == tuple(range(19, 28))
    assert layers_of(MidpointPlanConfig()) == tuple(range(14))
    assert layers_of(FromProfilePlanConfig(), profile) == tuple(range(5))
    assert layers_of(FromProfilePlanConfig(freeze="shallow"), profile) == tuple(range(5, 28))
    assert layers_of(ReversePlanConfig(), profile) == tuple(range(23, 28))
    assert layers_of(SemanticPlanConfig(), profile) == tuple(range(20, 28))
    assert layers_of(TopKSensitivityPlanConfig(k=3), profile) == (0, 1, 2)


@pytest.mark.parametrize("k", [1, 3, 8, 15, 27, 28])
def test_spread_layers_are_k_with_equal_gaps_and_equal_ends(k: int) -> None:
    layers = layers_of(SpreadPlanConfig(k=k))
    gaps = {after - before for before, after in pairwise(layers)}
    assert len(layers) == k and (not gaps or max(gaps) - min(gaps) <= 1)
    assert abs(layers[0] - (28 - 1 - layers[-1])) <= 1  # as much frozen below the lowest as above the highest
    with pytest.raises(PlanError, match=r"plan.k=29: must lie in 1..28"):
        layers_of(SpreadPlanConfig(k=29))


def test_a_random_plan_is_a_function_of_its_seed():
    first, again, other = (layers_of(RandomPlanConfig(k=14, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 14


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ([0, -1], (0, 27)),
        (["2:5"], (2, 3, 4)),
        (["first:1/4"], tuple(range(7))),
        (["last:0.1"], (25, 26, 27)),
        ([r"re:layers\.(3|11)\."], (3, 11)),
        (["26:"], (26, 27)),
    ],
)
def test_selectors_name_layers(selectors: list[Any], expected: tuple[int, ...]):
    assert layers_of(ExplicitPlanConfig(trainable=selectors)) == expected


@pytest.mark.parametrize(
    ("selectors", "words"),
    [
        ([28], "the nearest is model.layers.27"),
        (["30:40"], "matches no layer"),
        (["0:3", 2], "both select layer 2"),
        (["first:2"], "share must lie"),
        (["re:(["], "not a regular expression"),
        (["top:3:sensitivity"], "needs a layer profile"),
        (["middle"], "not a selector"),
    ],
)
def test_a_bad_selector_is_one_clear_error(selectors: list[Any], words: str):
    with pytest.raises(PlanError, match=words.replace("(", r"\(")):
        layers_of(ExplicitPlanConfig(trainable=selectors))


def test_profiled_policies_need_a_profile():
    with pytest.raises(PlanError, match=r"plan\.type=from_profile: needs a layer profile"):
        layers_of(FromProfilePlanConfig())


def test_tied_embeddings_need_one_choice():
    with pytest.raises(PlanError, match="contradict"):
        layers_of(FreezeDeepPlanConfig(boundary=5, train_embeddings=True))
    untied = SHAPE.model_copy(update={"is_tied": False})
    with pytest.raises(PlanError, match="are not tied"):
        make_plan(FreezeDeepPlanConfig(boundary=5, tied="trained"), model=MODEL, shape=untied)


def test_any_changed_byte_is_noticed_on_load(tmp_path: Path):
    path = tmp_path / "freeze_plan.json"
    plan = make_plan(FreezeDeepPlanConfig(boundary=14), model=MODEL, shape=SHAPE)
    plan.save(path)
    assert FreezePlan.load(path) == plan
    path.write_text(path.read_text().replace('"train_lm_head": false', '"train_lm_head": true'))
    with pytest.raises(PlanError, match="was changed after it was made"):
        FreezePlan.load(path)


def test_a_plan_of_another_model_is_refused():
    plan = make_full_plan(MODEL, SHAPE)
    with pytest.raises(PlanError, match="num_layers=28, the model at hand has num_layers=36"):
        plan.check_model(MODEL.model_copy(update={"num_layers": 36}))


def test_parameter_counts_by_hand():
    # attention 1024 x (2048 + 2 x 1024) + 2048 x 1024; feed-forward 3 x 1024 x 3072; norms 2 x 1024 + 2 x 128
    layer = 1024 * 4096 + 2048 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    assert SHAPE.layer_params(0) == layer
    assert SHAPE.total_params == 28 * layer + 151936 * 1024 + 1024 == 596_049_920
    plan = make_plan(FreezeDeepPlanConfig(boundary=14), model=MODEL, shape=SHAPE)
    assert predict_cost(plan, SHAPE, seq_len=4096).trainable_params == 14 * layer


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (FreezeDeepPlanConfig(boundary=14), 0.849),
        (FreezeShallowPlanConfig(boundary=14), 0.667),
        (FreezeDeepPlanConfig(boundary=14, tied="trained"), 0.912),
        (FreezeShallowPlanConfig(boundary=14, tied="trained"), 0.912),
        (FreezeShallowPlanConfig(boundary=14, tied="head_only"), 0.729),
    ],
)
def test_the_direction_of_a_plan_decides_its_cost(config: Any, share: float):
    plan = make_plan(config, model=MODEL, shape=SHAPE)
    full = predict_cost(make_full_plan(MODEL, SHAPE), SHAPE, seq_len=4096)
    assert full.total_flops == pytest.approx(4.986e9, rel=1e-3)
    assert predict_cost(plan, SHAPE, seq_len=4096).total_flops / full.total_flops == pytest.approx(share, abs=6e-4)


def test_the_explanation_says_why():
    plan = make_plan(FreezeShallowPlanConfig(boundary=14, tied="trained"), model=MODEL, shape=SHAPE)
    full = predict_cost(make_full_plan(MODEL, SHAPE), SHAPE, seq_len=4096)
    sentence = explain_cost(plan, SHAPE, predict_cost(plan, SHAPE, seq_len=4096), full)
    assert "pulls the gradient through every layer" in sentence
    text = explain_plan(plan)
    assert "| 13 | frozen |" in text and "| 14 | trains |" in text
    assert render_layer_map(plan).count("■") == 1 + 14 + 1 + 1
