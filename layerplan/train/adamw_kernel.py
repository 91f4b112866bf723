"""AdamW on a GPU in one launch: gradients are read in their dtype, masters and moments updated, weights rounded, once.

A table of addresses says where each tensor lies, since weights are hundreds of tensors of a few shapes: launched one by one,
they cost a fast host more time than the device needs for all of them. 28 bytes are moved per bfloat16 weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements of one program."""


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    addresses,
    tensor_of_block,
    block_in_tensor,
    sizes,
    values,
    scale,
    kept,
    num_tensors,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    weight_type: tl.constexpr,
    grad_type: tl.constexpr,
    has_master: tl.constexpr,
    block: tl.constexpr,
):
    which = tl.load(tensor_of_block + tl.program_id(0)).to(tl.int64)
    start = tl.load(block_in_tensor + tl.program_id(0)).to(tl.int64) * block
    size = tl.load(sizes + which)
    weight = tl.multiple_of(tl.load(addresses + which).to(tl.pointer_type(weight_type)), 16)
    grad = tl.multiple_of(tl.load(addresses + num_tensors + which).to(tl.pointer_type(grad_type)), 16)
    master = tl.multiple_of(tl.load(addresses + 2 * num_tensors + which).to(tl.pointer_type(tl.float32)), 16)
    mean = tl.multiple_of(tl.load(addresses + 3 * num_tensors + which).to(tl.pointer_type(tl.float32)), 16)
    square = tl.multiple_of(tl.load(addresses + 4 * num_tensors + which).to(tl.pointer_type(tl.float32)), 16)
    if tl.load(kept) > 0:
        factor, row = tl.load(scale), values + 4 * which
        at = start + tl.arange(0, block)
        if start + block <= size:  # without a mask 16 bytes are moved at once
            _update_block(
                weight, grad, master, mean, square, at, None, row, factor, beta1, beta2, eps, weight_type, has_master
            )
        else:
            _update_block(
                weight,
                grad,
                master,
                mean,
                square,
                at,
                at < size,
                row,
                factor,
                beta1,
                beta2,
                eps,
                weight_type,
                has_master,
            )


@triton.jit
def _update_block(  # type: ignore[no-untyped-def]
    weight,
    grad,
    master,
    mean,
    square,
    at,
    mask,
    row,
    factor,
    beta1: tl.constexpr,
    beta2: tl.constexpr,
    eps: tl.constexpr,
    weight_type: tl.constexpr,
    has_master: tl.constexpr,
):
    rate, decay, correction1, correction2 = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    g = tl.load(grad + at, mask=mask).to(tl.float32) * factor
    m, v, w = tl.load(mean + at, mask=mask), tl.load(square + at, mask=mask), tl.load(master + at, mask=mask)
    m += (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    w = w * (1 - rate * decay) - (rate / correction1) * m / (tl.sqrt(v / correction2) + eps)
    tl.store(mean + at, m, mask=mask)
    tl.store(square + at, v, mask=mask)
    tl.store(master + at, w, mask=mask)
    if has_master:
        tl.store(weight + at, w.to(weight_type), mask=mask)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TensorBlocks:
    """Which block of which tensor each program of the kernel works on."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        blocks = [-(-size // BLOCK) for size in sizes]
        self.count = sum(blocks)
        self.sizes = send(list(sizes), torch.int64, device)
        self.tensor = send([which for which, count in enumerate(blocks) for _ in range(count)], torch.int32, device)
        self.block = send([block for count in blocks for block in range(count)], torch.int32, device)


def update_weights(
    rows: Sequence[Sequence[Tensor]],
    blocks: TensorBlocks,
    values: Tensor,
    scale: Tensor,
    kept: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW over n weights; nothing changes where `kept` is 0.

    Args:
        rows: Weights, gradients, masters, first and second moments, n each, contiguous and aligned; weights and gradients of
            one dtype each, the others float32; masters are the weights themselves where those are float32.
        blocks: Of the weights' sizes.
        values: (n, 4) float32 on the device: rate, decay and both bias corrections of each weight.
        scale: Scalar all gradients are multiplied by.
        kept: Scalar.
        betas: Decays of the moments.
        eps: Added to the root.
    """
    weights, grads, masters = rows[:3]
    table = send([tensor.data_ptr() for row in rows for tensor in row], torch.int64, values.device)
    _update[(blocks.count,)](
        table,
        blocks.tensor,
        blocks.block,
        blocks.sizes,
        values,
        scale,
        kept,
        len(weights),
        *betas,
        eps,
        weight_type=_TYPES[weights[0].dtype],
        grad_type=_TYPES[grads[0].dtype],
        has_master=masters[0] is not weights[0],
        block=BLOCK,
    )


def is_readable(rows: Sequence[Sequence[Tensor]]) -> bool:
    """Whether every tensor is contiguous and begins where 16 bytes can be read at once."""
    return all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for row in rows for tensor in row)


def send(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A list on the device; waits for nothing."""
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
