"""Sizes of a decoder, read from its config file alone: what the cost model needs and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from layerplan.config.base import StrictModel
from layerplan.errors import PlanError


class ModelShape(StrictModel):
    """Sizes of an attention decoder whose layers are all alike."""

    num_layers: int = Field(ge=1)
    """Decoder layers."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    intermediate_size: int = Field(ge=1)
    """Width of the feed-forward layer."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_key_value_heads: int = Field(ge=1)
    """Key and value heads."""
    head_dim: int = Field(ge=1)
    """Width of one head."""
    vocab_size: int = Field(ge=1)
    """Rows of the embedding."""
    max_position_embeddings: int = Field(ge=1)
    """Longest sequence."""
    is_tied: bool
    """Input embedding and head share one matrix."""
    has_qk_norm: bool = False
    """Query and key are normalised per head (Qwen3)."""
    num_mlp_matrices: int = 3
    """3 for a gated feed-forward layer, 2 for a plain one."""

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads the sizes from a Hugging Face config.

        Raises:
            PlanError: Naming the size the config lacks.
        """
        values = _Reader(config)
        heads = values.integer("num_attention_heads", "n_head")
        hidden = values.integer("hidden_size", "n_embd")
        is_gpt2 = config.get("model_type") == "gpt2"
        return cls(
            num_layers=values.integer("num_hidden_layers", "n_layer"),
            hidden_size=hidden,
            intermediate_size=values.integer("intermediate_size", "n_inner", default=4 * hidden),
            num_attention_heads=heads,
            num_key_value_heads=values.integer("num_key_value_heads", default=heads),
            head_dim=values.integer("head_dim", default=hidden // heads),
            vocab_size=values.integer("vocab_size"),
            max_position_embeddings=values.integer("max_position_embeddings", "n_positions"),
            is_tied=bool(config.get("tie_word_embeddings", is_gpt2)),
            has_qk_norm=config.get("model_type") in ("qwen3", "olmo2"),
            num_mlp_matrices=2 if is_gpt2 else 3,
        )

    @property
    def attention_params(self) -> int:
        """Weights of one layer's attention projections."""
        queries = self.hidden_size * self.num_attention_heads * self.head_dim
        keys_values = 2 * self.hidden_size * self.num_key_value_heads * self.head_dim
        return 2 * queries + keys_values

    @property
    def mlp_params(self) -> int:
        """Weights of one layer's feed-forward matrices."""
        return self.num_mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def norm_params(self) -> int:
        """Weights of one layer's norms."""
        return 2 * self.hidden_size + (2 * self.head_dim if self.has_qk_norm else 0)

    @property
    def layer_params(self) -> int:
        """Parameters of one decoder layer."""
        return self.attention_params + self.mlp_params + self.norm_params

    @property
    def embedding_params(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def total_params(self) -> int:
        """Parameters of the model; a tied matrix counts once."""
        matrices = 1 if self.is_tied else 2
        return self.num_layers * self.layer_params + matrices * self.embedding_params + self.hidden_size


class _Reader:
    """Looks sizes up under the names different families give them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def integer(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self._config.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        if default is None:
            raise PlanError(f"model config: {' or '.join(names)} is missing or not an integer")
        return default
