"""The layers of a stitched model that no donor has, initialised as its class does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def iter_new_tensors(model: Any, layer: int, *, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names inside the model and values of one new layer; a pure function of the config, the seed and the index.

    Args:
        model: The hybrid on the meta device.
        layer: Index of the layer.
        seed: Of the run.
        dtype: What the values are rounded to, as the rest of the model is stored.
    """
    from layerplan.models.hybrid.layer_kinds import LAYER_KINDS

    config = model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 100_003 + layer)
        built = LAYER_KINDS[config.layer_kinds[layer]].layer_class(config, layer).float()
        modules = list(built.modules())
        for module in reversed(modules):  # what a layer sets of its parts comes after the parts' own rule
            model._init_weights(module)
    for name, parameter in built.named_parameters():
        yield f"model.layers.{layer}.{name}", parameter.detach().to(dtype)


def describe_values(value: Tensor) -> str:
    """How a tensor was initialised, by the values it got."""
    numbers = value.float()
    if bool((numbers == numbers.flatten()[0]).all()):
        return f"all {float(numbers.flatten()[0]):g}"
    return f"drawn: mean {float(numbers.mean()):.2g}, standard deviation {float(numbers.std()):.3g}"
