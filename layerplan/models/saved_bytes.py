"""What a layer keeps for its backward pass, counted by PyTorch's hooks on saved tensors, on tensors without memory.

For layers whose mixing no formula over widths describes: a scan in chunks keeps products of every pair of a chunk's positions
for every head, in float32 whatever the rest is.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

DTYPES = ("float32", "bfloat16")


def measure_saved_bytes(
    forward: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[int, int]]:
    """By dtype: bytes kept by a frozen layer on the gradient path, and by one that trains; parameters are not counted.

    Args:
        forward: The layer's forward pass.
        layer: On the meta device, in float32; it is left so.
        args: What it is called with.
        kwargs: Likewise.
    """
    found = {}
    try:
        for name in DTYPES:
            layer.to(getattr(torch, name))
            kept = [_count(forward, layer, args, kwargs, getattr(torch, name), trained=each) for each in (False, True)]
            found[name] = kept[0], kept[1]
    finally:
        layer.to(torch.float32)
    return found


def _count(
    forward: Callable[..., Any],
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    *,
    trained: bool,
) -> int:
    def as_leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_() if tensor.is_floating_point() else tensor

    own = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    storages: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, so that its place is not given to another
        return tensor

    kwargs = {name: dict(value) if isinstance(value, UserDict) else value for name, value in kwargs.items()}
    args, kwargs = tree_map_only(Tensor, as_leaf, (args, kwargs))
    layer.requires_grad_(trained)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward(*args, **kwargs)
    del output
    return sum(storage.nbytes() for storage in storages.values())
