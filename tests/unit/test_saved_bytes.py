"""What layers are predicted to keep for backward, against PyTorch's hooks on saved tensors of real passes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.model_sizes import make_model_shape
from layerplan.plan.attention import CAUSAL
from layerplan.plan.memory import layer_activation_bytes
from layerplan.plan.model_shape import ModelShape

ROWS, TOKENS = 2, 128
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
HEADS = {"head_dim": 32}
EXPERTS = {"num_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": SMALL | HEADS,
    "gemma3_text": SMALL | HEADS | {"sliding_window": 64, "layer_types": MIXED["layer_types"]},
    "opt": SMALL | {"ffn_dim": 384, "word_embed_proj_dim": 128, "dropout": 0.0},
    "qwen3_moe": SMALL | HEADS | EXPERTS,
    "mixtral": SMALL | HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": SMALL
    | EXPERTS
    | {"num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
    | {"v_head_dim": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "bloom": {"hidden_size": 128, "n_layer": 2, "n_head": 4, "vocab_size": 256},
    "falcon": SMALL | {"alibi": False},
    "doge": SMALL | HEADS,
    "gpt2": {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": 512, "vocab_size": 256},
    "falcon_h1": SMALL
    | HEADS
    | {"mamba_d_ssm": 256, "mamba_n_groups": 1, "mamba_chunk_size": 64, "mamba_n_heads": 8, "mamba_d_head": 32}
    | {"mamba_d_state": 32},
    "qwen3_next": SMALL
    | HEADS
    | EXPERTS
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    | {"shared_expert_intermediate_size": 96, "layer_types": ["linear_attention", "full_attention"]},
    "gemma3n_text": SMALL
    | HEADS
    | MIXED
    | {"altup_num_inputs": 2, "laurel_rank": 16, "activation_sparsity_pattern": [0.0] * 2}
    | {"intermediate_size": [384] * 2, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 256},
}


@lru_cache
def shape_of(family: str) -> ModelShape:
    return make_model_shape(FAMILIES[family] | {"model_type": family})


def count_kept(family: str, dtype: torch.dtype, attention: str, *, trained: bool) -> int:
    """Bytes of all storages that the decoder's layers keep in training mode, weights and buffers not counted."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), dtype=dtype).train()
    if model._can_set_attn_implementation():
        model.set_attn_implementation(attention)
    model.requires_grad_(trained)
    model.enable_input_require_grads()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return forward(*args, **kwargs)

        return run

    for layer in find_decoder_parts(model).layers:
        layer.forward = watched(layer.forward)
    model(input_ids=torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % 250, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_what_was_predicted(family: str, attention: str) -> None:
    """Experts in groups, values narrower than keys and dropout on a CPU, code of its own, masks that train, hybrids."""
    shape = shape_of(family)
    assert shape.is_exact
    named = CAUSAL if attention == "sdpa" else attention
    how: dict[str, Any] = {"attention": named, "seq_len": TOKENS, "device_type": "cpu"}
    for dtype, trained in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        name = str(dtype).removeprefix("torch.")
        layers = range(shape.num_layers)
        each = [layer_activation_bytes(shape, name, trained=trained, layer=layer, **how) for layer in layers]
        real = count_kept(family, dtype, attention, trained=trained)
        assert 0.95 < ROWS * TOKENS * sum(each) / real < 1.1, (name, trained)
