"""Cross-entropy on a GPU: a chunk of logits becomes its own gradient, in place, in one launch.

A program takes one row. It reads the row for the log-sum-exp, block by block with a running maximum, and once more from its
end for the gradient, when what was read last is still in the cache: device memory is read once and written once, where
separate passes read it three times and hold the gradient beside the logits.

Shapes: C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16384
"""Logits of a row that a program holds at a time."""
NUM_WARPS = 16


@triton.jit
def _cap(raw, softcap):  # type: ignore[no-untyped-def]
    """`softcap * tanh(raw / softcap)`, to float32's rounding of `softcap`."""
    return softcap * (2 * tl.sigmoid(2 * raw / softcap) - 1)


@triton.jit
def _turn_row(  # type: ignore[no-untyped-def]
    logits,
    labels,
    losses,
    scale,
    z_weight,
    softcap,
    num_columns,
    ignored: tl.constexpr,
    has_softcap: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    base = logits + row * num_columns
    num_blocks = tl.cdiv(num_columns, block)
    if label == ignored:
        tl.store(losses + row, 0.0)
        for index in range(num_blocks):
            at = index * block + tl.arange(0, block)
            tl.store(base + at, tl.zeros((block,), tl.float32), mask=at < num_columns)
    else:
        # before any store: a label outside the vocabulary is told by a loss that is no number
        is_known = (label >= 0) & (label < num_columns)
        picked = tl.load(base + label, mask=is_known, other=float("nan")).to(tl.float32)
        largest = float("-inf")
        total = 0.0
        for index in range(num_blocks):
            at = index * block + tl.arange(0, block)
            raw = tl.load(base + at, mask=at < num_columns, other=float("-inf")).to(tl.float32)
            if has_softcap:
                raw = tl.where(at < num_columns, _cap(raw, softcap), float("-inf"))
            new = tl.maximum(largest, tl.max(raw, axis=0))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(raw - new), axis=0)
            largest = new
        log_sum = largest + tl.log(total)
        if has_softcap:
            picked = _cap(picked, softcap)
        tl.store(losses + row, log_sum - picked + z_weight * log_sum * log_sum)
        factor = (1 + 2 * z_weight * log_sum) * scale
        for index in range(num_blocks):
            at = (num_blocks - 1 - index) * block + tl.arange(0, block)
            raw = tl.load(base + at, mask=at < num_columns, other=0.0).to(tl.float32)
            capped = _cap(raw, softcap) if has_softcap else raw
            grad = tl.exp(capped - log_sum) * factor - tl.where(at == label, scale, 0.0)
            if has_softcap:
                grad = grad * (1 - (capped / softcap) * (capped / softcap))
            tl.store(base + at, grad, mask=at < num_columns)


def turn_into_gradient(
    logits_CV: Tensor, labels_C: Tensor, scale: float, softcap: float | None, z_weight: float, *, ignored: int
) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk, float32, and its logits, which now hold the gradient times `scale` of what they were.

    Args:
        logits_CV: Contiguous, of any floating dtype.
        labels_C: Token ids or `ignored`, int64.
        scale: What the gradient is multiplied by.
        softcap: Logits become `softcap * tanh(logits / softcap)` before they are a distribution; None leaves them.
        z_weight: Weight of the squared log-sum-exp.
        ignored: Label of positions without loss and gradient.
    """
    num_rows, num_columns = logits_CV.shape
    losses = torch.empty(num_rows, dtype=torch.float32, device=logits_CV.device)
    _turn_row[(num_rows,)](
        logits_CV,
        labels_C,
        losses,
        float(scale),
        float(z_weight),
        float(softcap or 1.0),
        num_columns,
        ignored=ignored,
        has_softcap=softcap is not None,
        block=min(BLOCK, triton.next_power_of_2(num_columns)),
        num_warps=NUM_WARPS,
    )
    return losses.sum(), logits_CV
