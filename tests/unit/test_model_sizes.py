"""What a model says of itself against what transformers really builds, PyTorch really counts, and publishers say."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

from layerplan.config.plan import ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig, FullPlanConfig
from layerplan.errors import ModelError, PlanError
from layerplan.models.freezing import apply_plan
from layerplan.models.layer_work import counting
from layerplan.models.model_sizes import load_model_shape, make_model_shape
from layerplan.plan.cost import count_trainable_params, predict_cost
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.memory import layer_activation_bytes
from layerplan.plan.model_shape import LayerShape, ModelShape
from layerplan.plan.policies import make_plan

BASE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
DEEPSEEK = LATENT | {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
ALIKE = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 96}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}

DENSE: dict[str, dict[str, Any]] = {
    "llama": BASE | {"attention_bias": True, "mlp_bias": True},
    "qwen2": BASE,
    "qwen3": BASE,
    "mistral": BASE | {"sliding_window": 8},
    "gemma": BASE,
    "gemma2": BASE | {"sliding_window": 8},
    "gemma3_text": BASE | {"sliding_window": 8},
    "phi": BASE,
    "phi3": BASE,
    "cohere": BASE,
    "cohere2": BASE | {"sliding_window": 8},
    "starcoder2": BASE,
    "smollm3": BASE,
    "stablelm": BASE,
    "olmo": BASE,
    "olmo2": BASE,
    "exaone4": BASE | {"sliding_window": 8},
    "gpt2": ALIKE,
    "gptj": ALIKE | {"rotary_dim": 4},
    "codegen": ALIKE | {"rotary_dim": 4},
    "gpt_neox": BASE,
    "falcon": {name: value for name, value in BASE.items() if name not in ("head_dim", "num_key_value_heads")},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 96},
    "opt": BASE | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "nemotron": BASE,
}
MIXED: dict[str, dict[str, Any]] = {
    "mixtral": BASE | EXPERTS,
    "qwen2_moe": BASE | EXPERTS | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen3_moe": BASE | EXPERTS,
    "olmoe": BASE | EXPERTS,
    "phimoe": BASE | EXPERTS,
    "granitemoe": BASE | EXPERTS,
    "deepseek_v2": BASE | DEEPSEEK,
    "deepseek_v3": BASE | DEEPSEEK,
    "gpt_oss": BASE | EXPERTS | {"sliding_window": 8},
    "llama4_text": BASE | EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "qwen3_next": BASE | EXPERTS | DELTA | {"shared_expert_intermediate_size": 16},
}
HYBRID: dict[str, dict[str, Any]] = {
    "gemma3n_text": BASE
    | {
        "sliding_window": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "lfm2": BASE | {"layer_types": ["conv", "full_attention"] * 2},
    "zamba2": BASE
    | {
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 32,
        "num_mem_blocks": 1,
    }
    | {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "num_key_value_heads": 4},
}
FAMILIES = DENSE | MIXED | HYBRID


def build(family: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), dtype=torch.float32)


@pytest.fixture(scope="module")
def shapes() -> dict[str, ModelShape]:
    return {}


def shape_of(family: str, shapes: dict[str, ModelShape]) -> ModelShape:
    if family not in shapes:
        shapes[family] = make_model_shape({"model_type": family, **FAMILIES[family]})
    return shapes[family]


def plan_of(config: Any, family: str, shape: ModelShape) -> Any:
    return make_plan(
        config, model=ModelIdentity(name=family, model_type=family, num_layers=shape.num_layers), shape=shape
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_layer_is_counted(family: str, shapes: dict[str, ModelShape]) -> None:
    model, shape = build(family, "meta"), shape_of(family, shapes)
    layers: dict[int, int] = defaultdict(int)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if match := re.search(r"\.(?:layers|h)\.(\d+)\.", name):
            layers[int(match[1])] += parameter.numel()
    assert [shape.layer_params(index) for index in range(shape.num_layers)] == [
        layers[index] for index in sorted(layers)
    ]
    assert shape.total_params == model.num_parameters() and shape.is_exact
    # what a plan says it trains is what it makes trainable
    plan = plan_of(ExplicitPlanConfig(trainable=[1, 3], train_final_norm=True), family, shape)
    apply_plan(model, plan)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_trainable_params(plan, shape) == trainable


def test_a_vision_tower_is_not_said_to_train_under_any_plan() -> None:
    text = {**FAMILIES["qwen3"], "num_hidden_layers": 4, "head_dim": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    values = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    shape = make_model_shape({"model_type": "gemma3", **values})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", **values), dtype=torch.float32)
    plan = plan_of(FullPlanConfig(), "gemma3", shape)
    idle = apply_plan(model, plan).idle
    assert idle and all("vision_tower" in name or "multi_modal_projector" in name for name in idle)
    assert shape.unreached_params == sum(model.get_parameter(name).numel() for name in idle) == shape.other_params
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_trainable_params(plan, shape) == trainable < shape.total_params == model.num_parameters()


def count_flops(model: nn.Module, seq_len: int) -> float:
    """FLOPs per token of one forward and backward pass over real numbers, attention as whole squares.

    Experts one after another: PyTorch's counter knows no grouped products.
    """
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    ids = torch.randint(3, 90, (1, seq_len))
    model.train()
    with counting() as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / seq_len


BOUNDS = {"qwen3_next": 0.06}
PLANS = [FullPlanConfig(), FreezeDeepPlanConfig(boundary=2), FreezeShallowPlanConfig(boundary=2)]


@pytest.mark.parametrize("family", [*DENSE, *MIXED])
def test_flops_are_those_of_a_real_pass(family: str, shapes: dict[str, ModelShape]) -> None:
    """Within 1 %: experts by what they really computed, in every direction of a plan.

    Within 6 % for the delta rule, whose reference does not do exactly twice its forward work in its backward pass.
    """
    model, shape = build(family), shape_of(family, shapes)
    model.set_attn_implementation("eager")
    for config in PLANS:
        plan = plan_of(config, family, shape)
        apply_plan(model, plan)
        model.zero_grad()
        predicted = predict_cost(plan, shape, seq_len=64, causal=False).total_flops
        assert predicted == pytest.approx(count_flops(model, 64), rel=BOUNDS.get(family, 0.01)), config.type


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def test_qwen3_30b_a3b_has_30_5_billion_parameters_of_which_3_3_are_at_work() -> None:
    shape = make_model_shape(QWEN3_30B_A3B)
    assert shape.total_params == 30_532_122_624
    assert shape.active_params == 3_353_032_704
    full = predict_cost(plan_of(FullPlanConfig(), "qwen3_moe", shape), shape, seq_len=4096)
    assert full.checkpoint_bytes == 12 * 30_532_122_624
    # of the active ones the embedding and the norms multiply nothing: attention, 8 of 128 experts, router, head
    layer = 2048 * (4096 + 2 * 512) + 4096 * 2048 + 8 * 3 * 2048 * 768 + 128 * 2048
    attention = 2 * 2 * 4096 * (4096 + 1) / 2
    assert full.forward_flops == 48 * (2 * layer + attention) + 2 * 2048 * 151936


TIED = ["gemma", "starcoder2", "cohere", "opt", "falcon", "smollm3"]


@pytest.mark.parametrize("family", TIED)
def test_embeddings_are_tied_when_the_model_ties_them(family: str, shapes: dict[str, ModelShape]) -> None:
    """None of these configs says so, as the published ones do not."""
    assert "tie_word_embeddings" not in FAMILIES[family]
    model, shape = build(family), shape_of(family, shapes)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shape.is_tied and shape.head_params == 0
    apply_plan(model, plan_of(FullPlanConfig(), family, shape))


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("mistral", [8, 8, 8, 8]),
        ("qwen2", [None] * 4),
        ("cohere2", [8, 8, 8, None]),
        ("gpt_oss", [8, None, 8, None]),
        ("gemma3n_text", [8, None, 8, None]),
    ],
)
def test_windows_are_those_of_the_models_own_masks(
    family: str, windows: list[int | None], shapes: dict[str, ModelShape]
) -> None:
    layers = shape_of(family, shapes).layers
    assert [layer.window for layer in layers] == windows and not any(layer.is_chunked for layer in layers)


def test_chunks_are_no_sliding_window(shapes: dict[str, ModelShape]) -> None:
    layers = shape_of("llama4_text", shapes).layers
    assert [(layer.window, layer.is_chunked) for layer in layers] == [(8, True)] * 3 + [(None, False)]


@pytest.mark.parametrize("seq_len", [5, 8, 50])
def test_mean_keys_are_those_of_the_masks_of_transformers(seq_len: int) -> None:
    index = torch.arange(seq_len)
    rules = {
        False: sliding_window_causal_mask_function(8),
        True: chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)),
    }
    for is_chunked, rule in rules.items():
        layer = LayerShape(params=0, matrix_params=0, window=8, is_chunked=is_chunked)
        read = rule(torch.tensor(0), torch.tensor(0), index[:, None], index[None]).sum()
        assert layer.mean_keys(seq_len, causal=True) == pytest.approx(read.item() / seq_len)


def test_latent_attention_reads_wider_queries_than_values(shapes: dict[str, ModelShape]) -> None:
    """4 heads of 8 + 8 for queries and keys, 8 for values; the first layer of DeepSeek is dense."""
    first, second = shape_of("deepseek_v3", shapes).layers[:2]
    assert first.attention_width == second.attention_width == 4 * (16 + 8)
    assert (first.routed_copies, second.routed_copies) == (0, 2)


def test_a_shared_block_counts_once(shapes: dict[str, ModelShape]) -> None:
    shape = shape_of("zamba2", shapes)
    (block,) = shape.shared
    assert block.layers == (1, 3)
    assert shape.count_layer_params([1, 3]) == shape.layer_params(1) + shape.layer_params(3) - block.params


def test_positions_are_found_by_any_name(shapes: dict[str, ModelShape]) -> None:
    assert shape_of("gpt2", shapes).max_position_embeddings == 128


def test_work_that_cannot_be_counted_is_estimated_and_says_so() -> None:
    """JetMoE's router looks at its own counts, which a model without values does not have."""
    values = BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **values))
    shape = make_model_shape({"model_type": "jetmoe", **values})
    assert shape.total_params == model.num_parameters() and not shape.is_exact
    predicted = predict_cost(plan_of(FullPlanConfig(), "jetmoe", shape), shape, seq_len=64, causal=False).total_flops
    model.set_attn_implementation("eager")
    assert predicted == pytest.approx(count_flops(model, 64), rel=0.05)


def test_a_config_that_makes_no_model_is_one_line(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="model_type=qwen3: the config cannot be read"):
        make_model_shape({"model_type": "qwen3", "num_hidden_layers": "many"})
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ModelError, match="its config cannot be read"):
        load_model_shape(str(tmp_path))
    with pytest.raises(PlanError, match="the model must be asked"):
        ModelShape.from_hf_config({"model_type": "mixtral"})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_config_alone_says_what_the_model_says(family: str, tied: bool) -> None:
    """All but what its layers were measured to keep."""
    values = BASE | {"model_type": family, "tie_word_embeddings": tied, "attention_bias": True}
    measured = make_model_shape(values)
    layers = tuple(layer.model_copy(update={"saved_bytes": {}}) for layer in measured.layers)
    found = ModelShape.from_hf_config(values)
    assert found == measured.model_copy(update={"layers": layers})
    for trained in (True, False):
        by_widths, kept = (layer_activation_bytes(shape, "bfloat16", trained=trained) for shape in (found, measured))
        assert by_widths == pytest.approx(kept, rel=0.25)
