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

from layerplan.models.hybrid import nemotron


def _nothing(module: nn.Module, config: Any) -> None:
    """Leaves a module as transformers initialises it."""


def _no_sizes(values: Mapping[str, Any]) -> None:
    """A kind whose sizes are the config's own takes no others."""
    if values:
        raise ValueError(f"{next(iter(values))!r} is given, but its sizes are those of the config itself")


@dataclass(frozen=True)
class LayerKind:
    """What a hybrid knows about one kind of layer."""

    layer_class: Callable[[Any, int], nn.Module]
    """Builds the layer from the hybrid's config and the layer's index."""
    layer_types: tuple[str, ...]
    """transformers' names of how such a layer is masked and cached; the first unless the config says another."""
    donor_types: tuple[str, ...] = ()
    """Model types whose decoder layers are of this kind, tensor names included."""
    check_sizes: Callable[[Mapping[str, Any]], None] = _no_sizes
    """Raises `ValueError` for sizes of its own that it does not know or cannot have."""
    initialize: Callable[[nn.Module, Any], None] = _nothing
    """Called with every module of the model after transformers' own rule; sets what that rule does not know."""
    takes_documents: bool = False
    """Whether the layer's forward pass starts anew at every document of a packed row."""


LAYER_KINDS: dict[str, LayerKind] = {
    "qwen3": LayerKind(Qwen3DecoderLayer, layer_types=("full_attention", "sliding_attention"), donor_types=("qwen3",)),
    "nemotron": LayerKind(
        nemotron.NemotronLayer,
        layer_types=("linear_attention",),
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


def find_kind_of_donor(model_type: str) -> str:
    """Name of the kind that a model's decoder layers are of; raises `ValueError` when they are of none."""
    known = {each: name for name, kind in LAYER_KINDS.items() for each in kind.donor_types}
    if model_type not in known:
        raise ValueError(f"its layers are those of a {model_type}; a hybrid takes those of {', '.join(known)}")
    return known[model_type]
