"""The config of a hybrid: Qwen3's fields, the kind of every layer, and the sizes of kinds that have their own."""

# no postponed annotations: transformers reads them when the class is made

from typing import Any

from transformers import Qwen3Config

from layerplan.models.hybrid.layer_kinds import find_kind
from layerplan.models.hybrid.nemotron import SIZES
from layerplan.models.own_types import HYBRID_TYPE


class HybridConfig(Qwen3Config):
    """Sizes of embeddings, attention layers and head as Qwen3 names them.

    `layer_kinds` has an entry of `LAYER_KINDS` per layer, `kind_sizes` what each kind does not read from the fields of
    Qwen3, and `layer_types` follows from the kinds: it is by what transformers makes masks and caches.
    """

    model_type = HYBRID_TYPE

    layer_kinds: list[str] | None = None
    kind_sizes: dict[str, dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        names: list[str] = self.layer_kinds or ["qwen3"] * int(self.num_hidden_layers)
        self.layer_kinds, self.kind_sizes = names, self.kind_sizes or {}
        self.num_hidden_layers: int = len(names)
        self.max_window_layers = len(names)  # vLLM refuses a model of which a window might cover a part
        kinds = [find_kind(name) for name in names]
        self.layer_types: list[str] = self.layer_types or [kind.layer_types[0] for kind in kinds]
        for index, (name, kind, layer_type) in enumerate(zip(names, kinds, self.layer_types)):
            if layer_type not in kind.layer_types:
                raise ValueError(f"layer {index} is of kind {name!r} and cannot be of layer type {layer_type!r}")
        for name in sorted({*names, *self.kind_sizes}):
            try:
                find_kind(name).check_sizes(self.kind_sizes.get(name, {}))
            except ValueError as error:
                raise ValueError(f"kind_sizes.{name}: {error}") from None
        super().__post_init__(**kwargs)

    @property
    def mamba_chunk_size(self) -> int:
        """Tokens of a chunk of Mamba2's scan, by the name vLLM asks for it."""
        return int((self.kind_sizes or {}).get("nemotron", {}).get("chunk_size", SIZES["chunk_size"]))
