"""Activation checkpointing of the decoder layers that `layerplan.plan.placement` chose."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_layers(layers: Sequence[nn.Module] | nn.ModuleList, indices: Iterable[int]) -> None:
    """Makes these layers recompute their activations in backward."""
    for index in indices:
        layer = layers[index]
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
