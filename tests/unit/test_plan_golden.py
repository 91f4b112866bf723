"""Forty plans on three real configs, each with its trainable layers and its parameter count worked out by hand.

Counts are sums of the model's own matrices: attention h (q + 2 k) + q h, feed-forward 3 h f, norms 2 h + 2 d per layer;
h = residual width, q and k = query and key widths, f = feed-forward width, d = head width.
"""

from __future__ import annotations

from typing import Any

import pytest

from layerplan.config.plan import ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig, FullPlanConfig
from layerplan.errors import PlanError
from layerplan.plan.cost import count_trainable_params
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from tests.qwen3 import QWEN3_0P6B, QWEN3_8B, QWEN3_14B

CONFIGS = {"0.6B": QWEN3_0P6B, "8B": QWEN3_8B, "14B": QWEN3_14B}
# by hand: 1024 * 4096 + 2048 * 1024 + 3 * 1024 * 3072 + 2 * 1024 + 256, and so on
LAYER = {"0.6B": 15_730_944, "8B": 192_946_432, "14B": 330_311_936}
EMBEDDING = {"0.6B": 155_582_464, "8B": 622_329_856, "14B": 777_912_320}
NORM = {"0.6B": 1024, "8B": 4096, "14B": 5120}
TOTAL = {"0.6B": 596_049_920, "8B": 8_190_735_360, "14B": 14_768_307_200}

Explicit, Deep, Shallow = ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig
GOLDEN: list[tuple[str, Any, list[int], int]] = [
    ("0.6B", FullPlanConfig(), list(range(28)), 596_049_920),
    ("0.6B", Deep(split_ratio=1 / 3), list(range(9)), 141_578_496),
    ("0.6B", Deep(split_ratio=1 / 2), list(range(14)), 220_233_216),
    ("0.6B", Deep(split_ratio=2 / 3), list(range(19)), 298_887_936),
    ("0.6B", Deep(boundary=14, tied="trained"), list(range(14)), 375_815_680),
    ("0.6B", Deep(boundary=1), [0], 15_730_944),
    ("0.6B", Deep(boundary=27, train_final_norm=True), list(range(27)), 424_736_512),
    ("0.6B", Shallow(split_ratio=1 / 3), list(range(9, 28)), 298_887_936),
    ("0.6B", Shallow(split_ratio=1 / 2), list(range(14, 28)), 220_233_216),
    ("0.6B", Shallow(split_ratio=2 / 3), list(range(19, 28)), 141_578_496),
    ("0.6B", Shallow(boundary=14, tied="head_only"), list(range(14, 28)), 375_815_680),
    ("0.6B", Shallow(boundary=27, train_final_norm=True), [27], 15_731_968),
    ("0.6B", Explicit(trainable=[0]), [0], 15_730_944),
    ("0.6B", Explicit(trainable=[-1, 0]), [0, 27], 31_461_888),
    ("0.6B", Explicit(trainable=["9:14"]), [9, 10, 11, 12, 13], 78_654_720),
    ("0.6B", Explicit(trainable=[":3", "25:"]), [0, 1, 2, 25, 26, 27], 94_385_664),
    ("0.6B", Explicit(trainable=["-3:-1"]), [25, 26], 31_461_888),
    ("0.6B", Explicit(trainable=["first:1/4"]), list(range(7)), 110_116_608),
    ("0.6B", Explicit(trainable=["last:0.1"]), [25, 26, 27], 47_192_832),
    ("0.6B", Explicit(trainable=["first:1/28", "last:1/28"]), [0, 27], 31_461_888),
    ("0.6B", Explicit(trainable=[r"re:layers\.(3|11)\."]), [3, 11], 31_461_888),
    ("0.6B", Explicit(trainable=[r"re:layers\.2\d\."]), list(range(20, 28)), 125_847_552),
    ("0.6B", Explicit(trainable=["role:attention"]), list(range(28)), 440_466_432),
    ("0.6B", Explicit(trainable=[5, "role:final_norm"]), [5], 15_731_968),
    ("0.6B", Explicit(trainable=[5, "role:embeddings", "role:lm_head"]), [5], 171_313_408),
    ("0.6B", Explicit(trainable=["role:lm_head"], tied="head_only"), [], 155_582_464),
    ("8B", FullPlanConfig(), list(range(36)), 8_190_735_360),
    ("8B", Deep(split_ratio=1 / 3), list(range(12)), 2_315_357_184),
    ("8B", Deep(boundary=18, train_embeddings=True), list(range(18)), 4_095_365_632),
    ("8B", Shallow(split_ratio=2 / 3), list(range(24, 36)), 2_315_357_184),
    ("8B", Shallow(boundary=24, train_lm_head=True), list(range(24, 36)), 2_937_687_040),
    ("8B", Explicit(trainable=["role:lm_head"]), [], 622_329_856),
    ("8B", Explicit(trainable=["0:36:".rstrip(":")]), list(range(36)), 6_946_071_552),
    ("8B", Explicit(trainable=[r"re:^lm_head", 35]), [35], 815_276_288),
    ("14B", FullPlanConfig(), list(range(40)), 14_768_307_200),
    ("14B", Deep(split_ratio=1 / 3), list(range(13)), 4_294_055_168),
    ("14B", Deep(split_ratio=0.5, train_final_norm=True), list(range(20)), 6_606_243_840),
    ("14B", Shallow(split_ratio=2 / 3), list(range(27, 40)), 4_294_055_168),
    ("14B", Shallow(boundary=39, train_final_norm=True, train_lm_head=True), [39], 1_108_229_376),
    ("14B", Explicit(trainable=["first:0.05", "last:0.05"]), [0, 1, 38, 39], 1_321_247_744),
]


@pytest.mark.parametrize("size", CONFIGS)
def test_the_parts_add_up_to_the_model(size: str) -> None:
    shape = ModelShape.from_hf_config(CONFIGS[size])
    matrices = 1 if shape.is_tied else 2
    assert shape.layer_params(0) == LAYER[size]
    assert shape.num_layers * LAYER[size] + matrices * EMBEDDING[size] + NORM[size] == TOTAL[size] == shape.total_params


@pytest.mark.parametrize(("size", "config", "layers", "params"), GOLDEN)
def test_a_plan_trains_what_was_worked_out_by_hand(size: str, config: Any, layers: list[int], params: int) -> None:
    shape = ModelShape.from_hf_config(CONFIGS[size])
    model = ModelIdentity(name=size, model_type="qwen3", num_layers=shape.num_layers)
    plan = make_plan(config, model=model, shape=shape)
    assert list(plan.trainable_layers) == layers
    assert count_trainable_params(plan, shape) == params


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Explicit(trainable=[28]), "layer 28 does not exist; the nearest is model.layers.27"),
        (Explicit(trainable=["30:40"]), "'30:40' matches no layer; the nearest is model.layers.27"),
        (Explicit(trainable=[r"re:model\.layer\.7\."]), "matches no parameter; the nearest is model.layers.7."),
        (Explicit(trainable=[r"re:embed_token_weights"]), "the nearest is model.embed_tokens.weight"),
        (Explicit(trainable=["role:lmhead"]), "'role:lmhead' is no role; the nearest is role:lm_head"),
        (Explicit(trainable=["role:mamba2"]), "matches no layer; the model's layers are decoder"),
        (Explicit(trainable=["0:3", 2]), "2 and '0:3' both select layer 2"),
        (Explicit(trainable=["role:lm_head"]), "train_embeddings=False and plan.train_lm_head=True contradict"),
        (Deep(boundary=28), r"plan.boundary=28: must lie in 1..27"),
        (Shallow(boundary=14, tied="frozen", train_lm_head=True), "plan.tied=frozen contradicts"),
    ],
)
def test_what_contradicts_itself_or_matches_nothing_is_one_clear_error(config: Any, words: str) -> None:
    shape = ModelShape.from_hf_config(CONFIGS["0.6B"])
    model = ModelIdentity(name="0.6B", model_type="qwen3", num_layers=28)
    with pytest.raises(PlanError) as caught:
        make_plan(config, model=model, shape=shape)
    assert words in str(caught.value)
