"""Another kind of layers is one entry of a table: transformers' gated delta rule beside Qwen3's and Nemotron's layers."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

from layerplan.config.plan import ExplicitPlanConfig
from layerplan.config.train import OptimizerConfig
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.freezing import apply_plan, check_gradient_coverage
from layerplan.models.hybrid.layer_kinds import LAYER_KINDS, LayerKind
from layerplan.models.meta import build_without_memory
from layerplan.models.model_sizes import measure_shape
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.policies import make_plan
from layerplan.train.optim import build_optimizer
from layerplan.train.self_test import ask_model
from tests.hybrids import NEMOTRON, build_hybrid, load

KINDS = ["gated_delta", "nemotron", "qwen3"]
SIZES = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


def build_layer(config, layer_idx):
    own = {"hidden_size": config.hidden_size, "intermediate_size": 48, "num_experts": 0, **SIZES}
    types = ["linear_attention"] * config.num_hidden_layers
    return Qwen3NextDecoderLayer(
        Qwen3NextConfig(**own, num_hidden_layers=config.num_hidden_layers, layer_types=types), layer_idx
    )


@pytest.fixture
def hybrid(monkeypatch):
    monkeypatch.setitem(LAYER_KINDS, "gated_delta", LayerKind(build_layer, layer_types=("linear_attention",)))
    return build_hybrid(KINDS, kind_sizes={"nemotron": NEMOTRON})


def draw_ids(tokens):
    return torch.randint(1, 40, (2, tokens), generator=torch.Generator().manual_seed(0))


def test_it_trains_a_step_with_the_rest_frozen(hybrid):
    """A step of AdamW lowers the loss; gradients are exactly on the new layer, and nothing else moves."""
    hybrid.train()
    with_ends = {"train_embeddings": False, "train_final_norm": False, "train_lm_head": False}
    identity = ModelIdentity(name="tiny", model_type="layerplan_hybrid", num_layers=3)
    shape = measure_shape(build_without_memory(hybrid.config, name="hybrid"))
    plan = make_plan(ExplicitPlanConfig(trainable=[0], **with_ends), model=identity, shape=shape)
    applied = apply_plan(hybrid, plan)
    before = {name: value.detach().clone() for name, value in hybrid.named_parameters()}
    optimizer = build_optimizer(hybrid, OptimizerConfig(learning_rate=1e-2))
    losses = []
    for _ in range(2):
        loss = hybrid(input_ids=draw_ids(33), labels=draw_ids(33), use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        check_gradient_coverage(hybrid, applied)
        optimizer.step()
        hybrid.zero_grad()
    moved = {name for name, value in hybrid.named_parameters() if not torch.equal(value, before[name])}
    assert losses[1] < losses[0]
    assert moved == applied.trainable and all(name.startswith("model.layers.0.") for name in moved)


def test_it_generates_saves_loads_and_is_sized_like_any_other(hybrid, tmp_path):
    cached = hybrid.generate(draw_ids(12), max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(cached[:, -1], hybrid(cached[:, :-1], use_cache=False).logits[:, -1].argmax(-1))
        assert len(hybrid(draw_ids(5), output_hidden_states=True).hidden_states) == 4
    hybrid.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert all(torch.equal(value, hybrid.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert type(find_decoder_parts(loaded).layers[0]) is Qwen3NextDecoderLayer
    assert ModelRef(str(tmp_path)).shape().total_params == hybrid.num_parameters()


def test_the_self_test_asks_it_how_rows_are_packed(hybrid):
    """It does not take the starts of documents, so that every row is one document."""
    assert ask_model(hybrid, seq_len=64).recipe.rows == "alone"
