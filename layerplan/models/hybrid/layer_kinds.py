"""The kinds of layers a hybrid is made of, each one entry of a table.

A layer is called as transformers calls its own: with the residual stream, the mask of its `layer_types` entry, rotary
position embeddings, positions and the cache. What carries a state over positions may take `documents` besides, the pieces
of packed rows at whose starts the state is nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from layerplan.models.hybrid import nemotron, nemotron_donor


def _nothing(module: nn.Module, config: Any) -> None:
    """Leaves a module as transformers initialises it."""


def _no_sizes(values: Mapping[str, Any]) -> None:
    """A kind whose sizes are the config's own takes no others."""
    if values:
        raise ValueError(f"{next(iter(values))!r} is given, but its sizes are those of the config itself")


def _any_index(config: Mapping[str, Any], layer: int) -> None:
    """Every layer of the family serves."""


def _no_own_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class DonorLayers:
    """How the decoder layers of a model family become layers of a kind."""

    model_type: str
    """The family's."""
    parts: tuple[str, ...] = ("",)
    """Where in a layer of the kind each of as many neighbours of the family goes; empty for one that is the layer itself."""
    check: Callable[[Mapping[str, Any], int], None] = _any_index
    """Raises `ValueError` when the neighbours from an index on, by the family's config, are no layer of the kind."""
    read_sizes: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_own_sizes
    """What the family's config says of the sizes that the kind has of its own."""


@dataclass(frozen=True)
class LayerKind:
    """What a hybrid knows about one kind of layer."""

    layer_class: Callable[[Any, int], nn.Module]
    """Builds the layer from the hybrid's config and the layer's index."""
    layer_types: tuple[str, ...]
    """transformers' names of how such a layer is masked and cached; the first unless the config says another."""
    donors: tuple[DonorLayers, ...] = ()
    """Families whose layers can be taken."""
    check_sizes: Callable[[Mapping[str, Any]], None] = _no_sizes
    """Raises `ValueError` for sizes of its own that it does not know or cannot have."""
    initialize: Callable[[nn.Module, Any], None] = _nothing
    """Called with every module of the model after transformers' own rule; sets what that rule does not know."""
    takes_documents: bool = False
    """Whether the layer's forward pass starts anew at every document of a packed row."""


ENDS_TYPE = "qwen3"
"""Model type whose embedding, final norm and head a hybrid has."""
LAYER_KINDS: dict[str, LayerKind] = {
    "qwen3": LayerKind(
        Qwen3DecoderLayer, layer_types=("full_attention", "sliding_attention"), donors=(DonorLayers(ENDS_TYPE),)
    ),
    "nemotron": LayerKind(
        nemotron.NemotronLayer,
        layer_types=("linear_attention",),
        donors=(DonorLayers("nemotron_h", nemotron_donor.PARTS, nemotron_donor.check_pair, nemotron_donor.read_sizes),),
        check_sizes=nemotron.check_sizes,
        initialize=nemotron.initialize,
        takes_documents=True,
    ),
}


def find_kind(name: str) -> LayerKind:
    """The entry of a name; raises `ValueError` naming the nearest for one that there is not."""
    if name not in LAYER_KINDS:
        nearest = difflib.get_close_matches(name, LAYER_KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"layer kind {name!r} is unknown; the nearest is {nearest!r} (of {', '.join(LAYER_KINDS)})")
    return LAYER_KINDS[name]


def find_donor_layers(model_type: str) -> tuple[str, DonorLayers]:
    """The kind that a family's layers become, and how; raises `ValueError` when they become none."""
    known = {each.model_type: (name, each) for name, kind in LAYER_KINDS.items() for each in kind.donors}
    if model_type not in known:
        raise ValueError(f"its layers are those of a {model_type}; a hybrid takes those of {', '.join(known)}")
    return known[model_type]
