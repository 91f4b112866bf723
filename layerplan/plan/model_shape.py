"""Sizes of a decoder, read from its config file alone: what the cost model needs and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from layerplan.config.base import StrictModel
from layerplan.errors import PlanError

LayerKind = Literal["decoder", "attention", "mlp", "mamba2"]
"""What a layer mixes with: attention and feed-forward in one layer, or one mixer alone (NemotronH, Mamba2)."""

KNOWN = {"qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "olmo2", "gpt2", "mamba2", "nemotron_h"}
"""Families whose sizes are read exactly; every other one is taken for a decoder of the Llama kind."""
_BLOCK_KINDS: dict[str, LayerKind] = {
    "linear_attention": "mamba2",
    "mamba": "mamba2",
    "full_attention": "attention",
    "attention": "attention",
    "mlp": "mlp",
    "M": "mamba2",
    "*": "attention",
    "-": "mlp",
}
UNBOUNDED = 2**31 - 1
"""Longest sequence of a model without positions."""


class Mamba2Shape(StrictModel):
    """Sizes of a Mamba2 mixer."""

    inner_size: int = Field(ge=1)
    """Channels after the expansion: heads times head width."""
    num_heads: int = Field(ge=1)
    """Heads of the state-space model."""
    num_groups: int = Field(ge=1)
    """Groups of heads that share B and C."""
    state_size: int = Field(ge=1)
    """Width of the state per channel."""
    conv_kernel: int = Field(ge=1)
    """Positions of the short convolution."""
    chunk_size: int = Field(ge=1)
    """Positions computed at once in the dual form."""

    @property
    def conv_channels(self) -> int:
        """Channels of the short convolution: x, B and C."""
        return self.inner_size + 2 * self.num_groups * self.state_size


class ModelShape(StrictModel):
    """Sizes of a decoder. Layers are all alike unless `layer_kinds` says otherwise."""

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
    num_mlp_matrices: int = 3
    """3 for a gated feed-forward layer, 2 for a plain one."""
    num_norms: int = 2
    """Norms over the residual width in a layer."""
    has_input_norm: bool = True
    """A norm stands before a layer's first matrices; False for post-norm families (OLMo 2)."""
    norm_params_per_channel: int = 1
    """1 for RMSNorm, 2 for LayerNorm with its bias."""
    bias_params: int = 0
    """Biases of the matrices of one decoder layer."""
    position_params: int = 0
    """Learned position embeddings; they train under `full` only."""
    qk_norm_params: int = 0
    """Weights of the query and key norms of one layer."""
    layer_kinds: tuple[LayerKind, ...] = ()
    """Kind of each layer; empty when every layer is a `decoder`."""
    mamba: Mamba2Shape | None = None
    """Sizes of the Mamba2 layers, where there are any."""
    is_exact: bool = True
    """False for a family this module does not know: the sizes are then an approximation."""

    @model_validator(mode="after")
    def _kinds_fit(self) -> ModelShape:
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.num_layers} layers")
        if "mamba2" in self.layer_kinds and self.mamba is None:
            raise ValueError("mamba2 layers need mamba sizes")
        return self

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads the sizes from a Hugging Face config.

        Raises:
            PlanError: Naming the size the config lacks, or the kind of layer that is not known.
        """
        values = _Reader(config)
        family = str(config.get("model_type"))
        hidden = values.integer("hidden_size", "n_embd")
        if family == "mamba2":
            return cls._from_mamba2(values, config, hidden)
        heads = values.integer("num_attention_heads", "n_head")
        key_values = values.integer("num_key_value_heads", default=heads)
        head_dim = values.integer("head_dim", default=hidden // heads)
        intermediate = values.integer("intermediate_size", "n_inner", default=4 * hidden)
        positions = values.integer("max_position_embeddings", "n_positions")
        kinds = _layer_kinds(config) if family == "nemotron_h" else ()
        is_gpt2, is_hybrid = family == "gpt2", bool(kinds)
        has_attention_bias = is_gpt2 or bool(config.get("attention_bias", family == "qwen2"))
        qkv = (heads + 2 * key_values) * head_dim
        output_bias = hidden if is_gpt2 or (has_attention_bias and family in ("llama", "mistral")) else 0
        return cls(
            num_layers=len(kinds) if is_hybrid else values.integer("num_hidden_layers", "n_layer"),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_attention_heads=heads,
            num_key_value_heads=key_values,
            head_dim=head_dim,
            vocab_size=values.integer("vocab_size"),
            max_position_embeddings=positions,
            is_tied=bool(config.get("tie_word_embeddings", family in ("gpt2", "gemma", "gemma2"))),
            qk_norm_params={"qwen3": 2 * head_dim, "olmo2": (heads + key_values) * head_dim}.get(family, 0),
            num_mlp_matrices=2 if is_gpt2 or is_hybrid else 3,
            num_norms={"gemma2": 4, "nemotron_h": 1}.get(family, 2),
            has_input_norm=family != "olmo2",
            norm_params_per_channel=2 if is_gpt2 else 1,
            bias_params=(qkv + output_bias if has_attention_bias else 0) + (intermediate + hidden if is_gpt2 else 0),
            position_params=positions * hidden if is_gpt2 else 0,
            layer_kinds=kinds,
            mamba=_mamba_shape(values) if "mamba2" in kinds else None,
            is_exact=family in KNOWN,
        )

    @classmethod
    def _from_mamba2(cls, values: _Reader, config: Mapping[str, Any], hidden: int) -> ModelShape:
        num_layers = values.integer("num_hidden_layers")
        kind: LayerKind = "mamba2"
        return cls(
            num_layers=num_layers,
            hidden_size=hidden,
            intermediate_size=values.integer("expand", default=2) * hidden,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=1,
            vocab_size=values.integer("vocab_size"),
            max_position_embeddings=UNBOUNDED,
            is_tied=bool(config.get("tie_word_embeddings", False)),
            num_norms=1,
            layer_kinds=(kind,) * num_layers,
            mamba=_mamba_shape(values),
        )

    def kind(self, layer: int) -> LayerKind:
        """What the layer is made of."""
        return self.layer_kinds[layer] if self.layer_kinds else "decoder"

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

    def matrix_params(self, layer: int) -> int:
        """Weights of a layer that a token is multiplied with: its matrices, and a Mamba2 layer's convolution."""
        kind = self.kind(layer)
        if kind == "mamba2":
            mamba = self.mamba
            assert mamba is not None, "checked when the shape was made"
            into = self.hidden_size * (mamba.inner_size + mamba.conv_channels + mamba.num_heads)
            return into + mamba.conv_channels * mamba.conv_kernel + mamba.inner_size * self.hidden_size
        attention = self.attention_params if kind in ("decoder", "attention") else 0
        return attention + (self.mlp_params if kind in ("decoder", "mlp") else 0)

    def first_matrix_params(self, layer: int) -> int:
        """Weights of the matrices that read a layer's input directly: queries, keys, values, or the input projection."""
        kind = self.kind(layer)
        if kind == "mlp":
            return self.mlp_params // self.num_mlp_matrices * (self.num_mlp_matrices - 1)
        if kind == "mamba2":
            assert self.mamba is not None, "checked when the shape was made"
            return self.hidden_size * (self.mamba.inner_size + self.mamba.conv_channels + self.mamba.num_heads)
        return self.hidden_size * self.head_dim * (self.num_attention_heads + 2 * self.num_key_value_heads)

    def layer_params(self, layer: int) -> int:
        """All parameters of a decoder layer: matrices, biases, norms, and what a state-space model adds."""
        kind = self.kind(layer)
        params = self.matrix_params(layer) + self.num_norms * self.norm_params_per_channel * self.hidden_size
        if kind == "mamba2":
            assert self.mamba is not None, "checked when the shape was made"
            return params + self.mamba.conv_channels + 3 * self.mamba.num_heads + self.mamba.inner_size
        return params + (self.bias_params + self.qk_norm_params if kind != "mlp" else 0)

    @property
    def largest_layer_params(self) -> int:
        """Parameters of the largest decoder layer."""
        return max(self.layer_params(layer) for layer in range(self.num_layers))

    @property
    def embedding_params(self) -> int:
        """Parameters of the token embedding, which are those of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def final_norm_params(self) -> int:
        """Parameters of the norm after the last layer."""
        return self.norm_params_per_channel * self.hidden_size

    @property
    def total_params(self) -> int:
        """Parameters of the model; a tied matrix counts once."""
        matrices = 1 if self.is_tied else 2
        layers = sum(self.layer_params(layer) for layer in range(self.num_layers))
        return layers + matrices * self.embedding_params + self.position_params + self.final_norm_params


def _layer_kinds(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    blocks = config.get("layers_block_type") or config.get("hybrid_override_pattern") or ()
    unknown = sorted({str(block) for block in blocks if block not in _BLOCK_KINDS})
    if unknown or not blocks:
        raise PlanError(
            f"model config: layers_block_type has {', '.join(unknown) or 'no entries'}; known are {', '.join(_BLOCK_KINDS)}"
        )
    return tuple(_BLOCK_KINDS[block] for block in blocks)


def _mamba_shape(values: _Reader) -> Mamba2Shape:
    heads = values.integer("mamba_num_heads", "num_heads")
    return Mamba2Shape(
        inner_size=heads * values.integer("mamba_head_dim", "head_dim"),
        num_heads=heads,
        num_groups=values.integer("n_groups"),
        state_size=values.integer("ssm_state_size", "state_size"),
        conv_kernel=values.integer("conv_kernel"),
        chunk_size=values.integer("chunk_size"),
    )


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
