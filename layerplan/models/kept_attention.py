"""What a call of attention keeps for the backward pass, under each kind of code that training may run it by.

On the meta device no kernel is chosen, so that the question is asked here: a kernel keeps what it is given, what it gives and
a number for each query; what a kernel refuses, PyTorch spells out in products over pairs of positions, as `eager` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from layerplan.models import attention_probe
from layerplan.plan.model_shape import AttentionKind

WIDEST_GROUPED = 256
"""Widest heads for which transformers lets PyTorch's kernel share keys among queries; for wider ones it repeats them."""

BY_KERNEL = ("kernel", "causal", "masked")
"""Kinds that keep what attention gives, as a trained matrix after it does."""


def list_kept(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    asked: dict[str, Any],
    *,
    kernel_only: bool,
) -> dict[AttentionKind, list[Tensor]]:
    """By kind (`AttentionKind`): the tensors kept, in an order that does not depend on the row's length.

    Args:
        module: That attends, with an `eager` of its own; None where PyTorch's attention was called.
        query: (B, H, T, D), as keys and values of fewer heads are.
        key: Of the layer's dtype and on the meta device, as all.
        value: Of a width of its own.
        mask: What the layer was given.
        output: What a kernel is to return (`make_output`).
        asked: What else the layer asks for.
        kernel_only: Leaves out the other kinds.
    """
    groups = query.shape[1] // key.shape[1]
    sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
    wide_key, wide_value = (each.repeat_interleave(groups, 1) if groups > 1 else each for each in (key, value))
    if groups > 1 and module is None and not asked.get("enable_gqa"):  # no kernel anywhere takes heads that broadcast
        return {"kernel": _note(lambda: scaled_dot_product_attention(query, wide_key, wide_value))}
    spread = [query, wide_key, wide_value, output, sums]
    own_mask = mask if mask is not None and mask.is_floating_point() else None  # ours is boolean
    given_mask = query.new_empty(query.shape[2], key.shape[2]) if own_mask is None else own_mask
    kept: dict[AttentionKind, list[Tensor]] = {
        "kernel": [query, key, value, output, sums] if own_mask is None else [*spread, own_mask],
        "masked": [*spread, given_mask],
    }
    if kernel_only:
        return {"kernel": kept["kernel"]}
    if own_mask is None and not key.shape[-1] == value.shape[-1] <= WIDEST_GROUPED:
        kept["causal"] = spread
    if module is not None:
        kept["eager"] = _note(lambda: _attend_eagerly(module, query, key, value, mask, asked))
    dropout = float(asked.get("dropout") or 0.0)
    wants_mask_gradient = own_mask is not None and own_mask.requires_grad
    if wants_mask_gradient or _is_refused_by_cpu(query.shape[-1], value.shape[-1], dropout, query.dtype):

        def spell_out(k: Tensor, v: Tensor, **how: Any) -> Tensor:
            return scaled_dot_product_attention(query, k, v, dropout_p=dropout, **how)

        boolean = given_mask if own_mask is not None else given_mask.bool()
        kept["cpu_masked"] = _note(lambda: spell_out(wide_key, wide_value, attn_mask=boolean))
        if own_mask is None:
            kept["cpu"] = _note(lambda: spell_out(key, value, is_causal=True, enable_gqa=groups > 1))
        else:
            kept["cpu"] = kept["cpu_masked"]
    return kept


def make_output(query: Tensor, value: Tensor) -> Tensor:
    """What a kernel returns, (B, H, T, D) in memory by token."""
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)


def _attend_eagerly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, asked: dict[str, Any]
) -> object:
    """By the code that the module's own file has for it, as transformers does."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        return attention_probe.attend(module, query, key, value, mask)
    return own(module, query, key, value, mask, **asked)


def _note(run: Callable[[], object]) -> list[Tensor]:
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return kept


@lru_cache(maxsize=64)
def _is_refused_by_cpu(query_width: int, value_width: int, dropout: float, dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernel for CPUs does not serve heads of such widths; PyTorch is asked."""
    sizes: Sequence[int] = (1, 1, 2)
    query = torch.zeros(*sizes, query_width, dtype=dtype, requires_grad=True)
    value = torch.zeros(*sizes, value_width, dtype=dtype, requires_grad=True)
    return torch._fused_sdp_choice(query, query, value, None, dropout, True) == SDPBackend.MATH.value
