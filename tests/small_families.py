"""Tiny random models of families that differ in how their loss is computed, with weights large enough that a fault shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOWED = {"sliding_window": 8}
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": _WINDOWED,
    "qwen2": _WINDOWED | {"use_sliding_window": True, "max_window_layers": 2},
    "gemma2": _WINDOWED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0},
    "phi3": _WINDOWED,
    "starcoder2": _WINDOWED,
    "olmo3": _WINDOWED,
    "cohere2": _WINDOWED | {"logit_scale": 0.25},
    "exaone4": _WINDOWED | {"sliding_window_pattern": 2},
}
"""Eight families whose layers look no further back than eight tokens, all of them or some."""
OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "codegen": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "phi": {},
    "granite": {"logits_scaling": 8.0},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "bloom": {"n_layer": 3, "n_head": 4},
    "llama4_text": {"attention_chunk_size": 8, "intermediate_size_mlp": 48, "moe_layers": []},
}


def build_family(model_type: str, **changes: Any) -> torch.nn.Module:
    """A model of the family in float32 and eval mode, with the weights of seed 0."""
    known = WINDOWED | OTHERS
    sizes = {} if model_type == "codegen" else _SIZES
    shared = {key: _SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "initializer_range")}
    config = AutoConfig.for_model(model_type, **{**shared, **sizes, **known[model_type], **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
