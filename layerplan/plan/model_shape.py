"""Sizes of a decoder, layer by layer: what the cost and memory models need and nothing more.

`layerplan.models.model_sizes` asks the model itself for them. A config alone is enough where the family is one whose
sizes follow from it, as for a base made on the spot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from layerplan.config.base import StrictModel
from layerplan.errors import PlanError

LayerKind = Literal["decoder", "attention", "mlp", "mamba2", "recurrent", "recurrent_decoder"]
"""What a layer is made of: attention and feed-forward, one of them alone, a Mamba2 mixer alone, or a mixer whose work
does not grow with the row (a state-space model, linear attention, a short convolution), alone or with a feed-forward."""

AttentionKind = Literal["kernel", "causal", "masked", "cpu", "cpu_masked", "eager"]
"""How attention is computed: by a kernel; by PyTorch's with repeated keys, or with a mask; by what PyTorch has on a CPU in place
of a kernel that refuses the layer, without a mask and with one; or spelled out by the model."""
UNBOUNDED = 2**31 - 1
"""Longest sequence of a model without positions."""
_DENSE_FAMILIES = {"llama": False, "qwen3": True}
"""Families whose sizes follow from their config, and whether queries and keys are normed."""
_DENSE_EVENTS = (
    "input_layernorm",
    "attention_input",
    "q_proj",
    "q_norm",
    "k_proj",
    "k_norm",
    "v_proj",
    "attention",
    "o_proj",
    "post_attention_layernorm",
    "feed_forward_input",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""What happens in a layer of theirs, in order; norms of queries and keys in some."""


class ModuleShape(StrictModel):
    """Sizes of a part of a layer that can train by itself, and when the forward pass comes by."""

    params: int = Field(ge=0)
    """All its parameters."""
    matrix_params: int = Field(default=0, ge=0)
    """Weights one token is multiplied with."""
    called: int = 0
    """When it runs, as a count of events of the layer's forward pass."""
    born: int = 0
    """When what it is given came into being; after another module ran, a gradient for that one passes through this one."""


class SavedBytes(StrictModel):
    """What a layer keeps for its backward pass, uncompiled."""

    frozen: float = Field(ge=0)
    """Per token, on the gradient path."""
    trained: float = Field(ge=0)
    """Per token."""
    per_pair: float = Field(default=0, ge=0)
    """For each pair of tokens of a row, in either case."""


class LayerShape(StrictModel):
    """Sizes of one decoder layer."""

    kind: LayerKind = "decoder"
    """What it is made of."""
    params: int = Field(ge=0)
    """All its parameters, those it shares with other layers included."""
    matrix_params: int = Field(ge=0)
    """Weights one token is multiplied with: of experts the active ones only."""
    idle_params: int = 0
    """Parameters of experts the token is not sent to."""
    first_matrix_params: int = 0
    """Those of them whose input needs no gradient when nothing below trains: no norm that trains stands before them."""
    attention_width: int = 0
    """Width of all queries plus width of all values: elements multiplied for every key read."""
    window: int | None = None
    """Most keys a query reads; None without a limit."""
    is_chunked: bool = False
    """Keys are read from the start of the query's chunk of `window` positions, instead of the last `window`."""
    scan_flops: float = 0.0
    """FLOPs per token that mix positions in a number that does not grow with the row."""
    query_width: int = 0
    """Query heads times head width."""
    key_value_width: int = 0
    """Widths of keys and values together."""
    feed_forward_width: int = 0
    """Channels a token passes in the feed-forward part, as of a gated one: of experts the active ones."""
    routed_copies: int = 0
    """Experts a token is sent to."""
    saved_bytes: dict[str, dict[AttentionKind, SavedBytes]] = Field(default_factory=dict)
    """What it keeps for the backward pass, by dtype and kind of attention, `kernel` of one that does not attend or has code
    of its own for it; empty where it was not measured."""
    modules: dict[str, ModuleShape] = Field(default_factory=dict)
    """Its parts by name (`layerplan/plan/modules.py`), in the model's order; empty where they are not known."""
    mixing_called: int = 0
    """When positions are mixed, in the count of the modules' `called`."""

    def mean_keys(self, seq_len: int, *, causal: bool) -> float:
        """Keys a query reads, averaged over a row; the whole square unless `causal`."""
        if not causal:
            return float(seq_len)
        if self.window is None or self.window >= seq_len:
            return (seq_len + 1) / 2
        if self.is_chunked:
            whole, rest = divmod(seq_len, self.window)
            return (whole * self.window * (self.window + 1) / 2 + rest * (rest + 1) / 2) / seq_len
        return self.window - self.window * (self.window - 1) / (2 * seq_len)


class SharedParams(StrictModel):
    """Parameters that several layers have in common, as Zamba's attention block."""

    layers: tuple[int, ...]
    """Layers that use them."""
    params: int = Field(ge=1)
    """How many."""


class ModelShape(StrictModel):
    """Sizes of a decoder."""

    layers: tuple[LayerShape, ...] = Field(min_length=1)
    """One entry per decoder layer."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
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
    embedding_params: int = Field(ge=1)
    """Parameters of the token embedding."""
    head_params: int = Field(ge=0)
    """Parameters of the head that the embedding does not have: nothing or a bias when tied."""
    head_matrix_params: int = Field(ge=1)
    """Weights of the head that a token is multiplied with."""
    final_norm_params: int = Field(ge=0)
    """Parameters of the norm after the last layer."""
    other_params: int = 0
    """Parameters beside all of these, such as learned positions; they train under `full` only."""
    unreached_params: int = 0
    """Those of them that no logit of a text depends on, such as a vision tower's; they stay frozen under every plan."""
    other_matrix_params: int = 0
    """Weights of matrices among them that a token is multiplied with."""
    shared: tuple[SharedParams, ...] = ()
    """Parameters that more than one layer counts as its own."""
    is_exact: bool = True
    """False where the model's work could not be counted and was estimated from its sizes."""

    @model_validator(mode="after")
    def _shared_fit(self) -> ModelShape:
        if any(layer >= len(self.layers) for block in self.shared for layer in block.layers):
            raise ValueError(f"shared names a layer beyond the {len(self.layers)}")
        return self

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads the sizes of a dense Llama or Qwen3 from its Hugging Face config alone.

        Raises:
            PlanError: Naming the size the config lacks, or a family whose model must be asked.
        """
        family = str(config.get("model_type"))
        if family not in _DENSE_FAMILIES or config.get("use_sliding_window") or config.get("mlp_bias"):
            raise PlanError(f"model_type={family}: its sizes do not follow from the config; the model must be asked")
        hidden, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
        key_values = _integer(config, "num_key_value_heads", heads)
        head_dim = _integer(config, "head_dim", hidden // heads)
        vocab_size, is_tied = _integer(config, "vocab_size"), bool(config.get("tie_word_embeddings", False))
        has_biases = bool(config.get("attention_bias", False))
        layer = _dense_layer(
            hidden,
            _integer(config, "intermediate_size"),
            queries=heads * head_dim,
            keys=key_values * head_dim,
            norm=head_dim if _DENSE_FAMILIES[family] else 0,
            has_biases=has_biases,
        )
        return cls(
            layers=(layer,) * _integer(config, "num_hidden_layers"),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=key_values,
            head_dim=head_dim,
            vocab_size=vocab_size,
            max_position_embeddings=_integer(config, "max_position_embeddings"),
            is_tied=is_tied,
            embedding_params=vocab_size * hidden,
            head_params=0 if is_tied else vocab_size * hidden,
            head_matrix_params=vocab_size * hidden,
            final_norm_params=hidden,
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    def kind(self, layer: int) -> LayerKind:
        """What the layer is made of."""
        return self.layers[layer].kind

    def check_seq_len(self, seq_len: int) -> None:
        """Raises `PlanError` when rows are longer than the model's positions."""
        if seq_len > self.max_position_embeddings:
            raise PlanError(f"corpus.seq_len={seq_len}: the model has {self.max_position_embeddings} positions")

    def layer_params(self, layer: int) -> int:
        """All parameters of a decoder layer."""
        return self.layers[layer].params

    def count_layer_params(self, layers: Iterable[int]) -> int:
        """Parameters of some decoder layers together; what they share counts once."""
        chosen = set(layers)
        repeats = sum(block.params * max(0, len(chosen.intersection(block.layers)) - 1) for block in self.shared)
        return sum(self.layers[layer].params for layer in chosen) - repeats

    @property
    def largest_layer_params(self) -> int:
        """Parameters of the largest decoder layer."""
        return max(layer.params for layer in self.layers)

    @property
    def total_params(self) -> int:
        """Parameters of the model; a tied matrix counts once."""
        ends = self.embedding_params + self.head_params + self.final_norm_params
        return self.count_layer_params(range(self.num_layers)) + ends + self.other_params

    @property
    def active_params(self) -> int:
        """Parameters at work for one token: all but those of experts it is not sent to."""
        idle = sum(layer.idle_params for layer in self.layers)
        return self.total_params - idle


def _dense_layer(hidden: int, intermediate: int, *, queries: int, keys: int, norm: int, has_biases: bool) -> LayerShape:
    when = {name: event for event, name in enumerate(name for name in _DENSE_EVENTS if norm or name[1:] != "_norm")}

    def matrix(inputs: int, outputs: int, name: str, given: str, *, bias: bool = False) -> ModuleShape:
        size = inputs * outputs
        params = size + (outputs if bias else 0)
        return ModuleShape(params=params, matrix_params=size, called=when[name], born=when[given])

    def vector(size: int, name: str) -> ModuleShape:
        return ModuleShape(params=size, called=when[name], born=when[name])

    modules = {
        "self_attn.q_proj": matrix(hidden, queries, "q_proj", "attention_input", bias=has_biases),
        "self_attn.k_proj": matrix(hidden, keys, "k_proj", "attention_input", bias=has_biases),
        "self_attn.v_proj": matrix(hidden, keys, "v_proj", "attention_input", bias=has_biases),
        "self_attn.o_proj": matrix(queries, hidden, "o_proj", "o_proj", bias=has_biases),
        **({f"self_attn.{each}_norm": vector(norm, f"{each}_norm") for each in "qk"} if norm else {}),
        "mlp.gate_proj": matrix(hidden, intermediate, "gate_proj", "feed_forward_input"),
        "mlp.up_proj": matrix(hidden, intermediate, "up_proj", "feed_forward_input"),
        "mlp.down_proj": matrix(intermediate, hidden, "down_proj", "down_proj"),
        "input_layernorm": vector(hidden, "input_layernorm"),
        "post_attention_layernorm": vector(hidden, "post_attention_layernorm"),
    }
    return LayerShape(
        params=sum(module.params for module in modules.values()),
        matrix_params=sum(module.matrix_params for module in modules.values()),
        attention_width=2 * queries,
        query_width=queries,
        key_value_width=2 * keys,
        feed_forward_width=intermediate,
        modules=modules,
        mixing_called=when["attention"],
    )


def _integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"model config: {name} is missing or not an integer")
    return value
