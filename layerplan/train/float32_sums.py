"""Gradients that PyTorch adds up in 16 bits on a CPU, added up in float32: of rows looked up, and of LayerNorm's parameters.

A sum in bfloat16 no longer grows by equal terms after 256 of them. A batch of text has its commonest tokens more often than
that, and a norm's weight has a term from every position, so that gradients come out too small. (GPUs, and layers that are
compiled, sum in float32; of the latter not rows that are looked up, see `looks_up_biases`.)

Shapes: N places, V rows, D width.
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

_SIGNATURES = {function: inspect.signature(function) for function in (F.embedding, F.layer_norm)}


def sum_in_float32(modules: Iterable[nn.Module], *, added_to: Tensor | None = None) -> None:
    """Makes modules that run uncompiled in 16 bits sum the gradients of their parameters in float32.

    Args:
        modules: Any modules, none within another.
        added_to: A weight that has a dense gradient in every backward pass, as a head has. An embedding of that very weight
            gives out the rows of its gradient that there are (a sparse tensor), instead of one that is zero elsewhere.
    """
    for module in modules:
        module.forward = partial(_run, module.forward, added_to)


def list_outside(model: nn.Module, layers: nn.ModuleList) -> list[nn.Module]:
    """The modules with trained parameters of their own that are not within its layers."""
    inside = set(layers.modules())
    return [
        module
        for module in model.modules()
        if module not in inside and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


def looks_up_biases(layer: nn.Module) -> bool:
    """Whether trained biases of experts are looked up by token, whose sums the compiler makes in their dtype."""
    return any(
        getattr(module, "has_bias", False)
        and any(
            parameter.requires_grad and "bias" in name for name, parameter in module.named_parameters(recurse=False)
        )
        for module in layer.modules()
        if hasattr(module, "is_transposed")  # experts in one tensor, as transformers marks them
    )


def _run(forward: Callable[..., Any], added_to: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    with _Sums(added_to):
        return forward(*args, **kwargs)


class _Sums(TorchFunctionMode):
    """Within it lookups and LayerNorm have backward passes of their own."""

    def __init__(self, added_to: Tensor | None) -> None:
        super().__init__()
        self._added_to = added_to

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _SIGNATURES:
            asked = _SIGNATURES[function].bind(*args, **kwargs)
            asked.apply_defaults()
            replace = self._embed if function is F.embedding else self._norm
            found: Tensor | None = replace(*asked.args)
            return function(*args, **kwargs) if found is None else found
        if function is Tensor.__getitem__ and _sums_in_16_bits(args[0]) and args[0].is_leaf and _is_places(args[1]):
            return _Lookup.apply(args[0], args[1], -1, False)
        return function(*args, **kwargs)

    def _embed(
        self,
        ids: Tensor,
        weight: Tensor,
        padding: int | None,
        max_norm: Any,
        norm_type: Any,
        scales: bool,
        sparse: bool,
    ) -> Tensor | None:
        if not _sums_in_16_bits(weight) or max_norm is not None or scales or sparse:
            return None
        rows: Tensor = _Lookup.apply(weight, ids, -1 if padding is None else padding, weight is self._added_to)
        return rows

    def _norm(self, given: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor | None:
        if weight is None or not _sums_in_16_bits(weight):
            return None
        normed: Tensor = _LayerNorm.apply(given, tuple(shape), weight, bias, eps)
        return normed


def _sums_in_16_bits(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.requires_grad
        and tensor.is_floating_point()
        and tensor.element_size() == 2
    )


def _is_places(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)


class _Lookup(torch.autograd.Function):
    """`weight[ids]`, rows of any shape."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int, as_rows: bool) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.settings = weight.shape, padding, as_rows
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (shape, padding, as_rows) = ctx.saved_tensors, ctx.settings
        found, places_N = ids.flatten().unique(return_inverse=True)
        sums = grad.new_zeros(len(found), *shape[1:], dtype=torch.float32)
        sums.index_add_(0, places_N, grad.reshape(-1, *shape[1:]).float())
        sums[found == padding] = 0
        rows = sums.to(grad.dtype)
        if as_rows:
            total = torch.sparse_coo_tensor(found[None], rows, shape, is_coalesced=True, check_invariants=False)
        else:
            total = grad.new_zeros(shape).index_copy_(0, found.long(), rows)
        return total, None, None, None


class _LayerNorm(torch.autograd.Function):
    """PyTorch's own, but for how its parameters' gradients are summed."""

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        output, mean, scale = torch.native_layer_norm(given, shape, weight, bias, eps)
        ctx.save_for_backward(given, mean, scale, weight, bias)
        ctx.settings = shape, eps
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (given, mean, scale, weight, bias), (shape, eps) = ctx.saved_tensors, ctx.settings
        needs_given, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        over = list(range(grad.ndim - len(shape)))
        grad_given = grad_weight = grad_bias = None
        if needs_given:
            asked = [True, False, False]
            grad_given = torch.ops.aten.native_layer_norm_backward(
                grad, given, shape, mean, scale, weight, bias, asked
            )[0]
        if needs_weight:
            normed = F.layer_norm(given.float(), shape, eps=eps)
            grad_weight = (grad.float() * normed).sum(over).to(weight.dtype)
        if needs_bias:
            grad_bias = grad.sum(over, dtype=torch.float32).to(bias.dtype)
        return grad_given, None, grad_weight, grad_bias, None
