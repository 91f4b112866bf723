"""Qwen3 in the sizes the tests share: three published shapes, and one small enough to train in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from layerplan.plan.layer_profile import ModelIdentity

QWEN3_0P6B: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
_LARGER = {"num_attention_heads": 32, "tie_word_embeddings": False}
QWEN3_8B = QWEN3_0P6B | _LARGER | {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288}
QWEN3_14B = (
    QWEN3_0P6B
    | _LARGER
    | {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 40}
)
QWEN3_0P6B_IDENTITY = ModelIdentity(name="Qwen3-0.6B", model_type="qwen3", num_layers=28)
TINY_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def build_tiny_qwen3(**changes: Any) -> Qwen3ForCausalLM:
    """`TINY_QWEN3` with changes, in float32, with the weights of seed 0."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**TINY_QWEN3, **changes})).float()
