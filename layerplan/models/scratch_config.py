"""The Hugging Face config of a base made on the spot, known before anything is built."""

from __future__ import annotations

from typing import Any

from layerplan.config.model import ScratchModelConfig


def make_hf_config(config: ScratchModelConfig, *, vocab_size: int, end_of_text_id: int = 0) -> dict[str, Any]:
    """Returns the Hugging Face config of the model, as plain values that need no transformers.

    Args:
        config: Sizes of the model.
        vocab_size: Entries the trained tokenizer really has; a small corpus can yield fewer than asked for.
        end_of_text_id: Token id that ends a document.
    """
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": None,
        "eos_token_id": end_of_text_id,
        "pad_token_id": end_of_text_id,
    }
