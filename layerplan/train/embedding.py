"""Gradients of embeddings on a CPU, summed over the places of a token in float32.

PyTorch's own backward pass adds them up one by one in the gradient's dtype. In bfloat16 a sum of equal terms no longer grows
after 256 of them, and a batch of text has its commonest tokens more often than that: their gradients come out too small. (On
GPUs, and in layers that are compiled, PyTorch sums in float32.)

Shapes: N places, V vocabulary, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_SIGNATURE = inspect.signature(F.embedding)


def sum_in_float32(modules: Iterable[nn.Module], *, added_to: Tensor | None = None) -> None:
    """Makes those embeddings among the modules that train in a 16-bit dtype sum their gradients in float32.

    Args:
        modules: Any modules; an embedding may scale or norm what it looks up.
        added_to: A weight that has a dense gradient in every backward pass, as a head has. An embedding of that very weight
            gives out the rows of its gradient that there are (a sparse tensor), instead of one that is zero elsewhere.
    """
    for module in modules:
        if isinstance(module, nn.Embedding) and module.weight.requires_grad and module.weight.element_size() == 2:
            module.forward = partial(_look_up, module.forward, module.weight is added_to)


def _look_up(forward: Callable[..., Any], as_rows: bool, *args: Any, **kwargs: Any) -> Any:
    with _Lookups(as_rows):
        return forward(*args, **kwargs)


class _Lookups(TorchFunctionMode):
    """Within it `embedding` has a backward pass of its own."""

    def __init__(self, as_rows: bool) -> None:
        super().__init__()
        self._as_rows = as_rows

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.embedding:
            asked = _SIGNATURE.bind(*args, **(kwargs or {}))
            asked.apply_defaults()
            ids, weight, padding, max_norm, _, by_frequency, is_sparse = asked.args
            if max_norm is None and not by_frequency and not is_sparse:
                return _Lookup.apply(weight, ids, -1 if padding is None else padding, self._as_rows)
        return function(*args, **(kwargs or {}))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor, padding: int, as_rows: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.settings = weight_VD.shape, padding, as_rows
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (shape, padding, as_rows) = ctx.saved_tensors, ctx.settings
        found, places_N = ids.flatten().unique(return_inverse=True)
        sums = grad.new_zeros(len(found), shape[1], dtype=torch.float32)
        sums.index_add_(0, places_N, grad.flatten(0, -2).float())
        sums[found == padding] = 0
        rows = sums.to(grad.dtype)
        if as_rows:
            return (
                torch.sparse_coo_tensor(found[None], rows, shape, is_coalesced=True, check_invariants=False),
                None,
                None,
                None,
            )
        return grad.new_zeros(shape).index_copy_(0, found, rows), None, None, None
