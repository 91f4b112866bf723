"""Cross-entropy straight from hidden states, without ever holding all logits.

The logits of a batch are the largest tensor of a small model with a large vocabulary: 8 x 4,096 tokens times 151,936
entries in float32 are 18.5 GiB, and autograd would keep several of them. Here a chunk of positions is projected,
turned into its loss *and* its gradient at once, and dropped. Logits have the dtype of the weights; the log-sum-exp,
the losses and the sums over chunks are float32.

Shapes: N positions, C positions of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerplan.plan.memory import choose_chunk_rows, count_rows_of_sum

IGNORED = -100
PRODUCT_ELEMENTS = 2**21
"""On a CPU products are added to a sum in pieces of so many elements, which stay in its caches and are not allocated anew."""


@dataclass(frozen=True)
class LossOptions:
    """What shapes the loss beside hidden states and labels."""

    softcap: float | None = None
    """Logits become `softcap * tanh(logits / softcap)` (Gemma)."""
    z_weight: float = 0.0
    """Weight of the squared log-sum-exp."""
    compiled: bool = False
    """Fuse everything after the projection with torch.compile."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden_ND @ weight_VD.T + bias_V` against labels_N, ignoring IGNORED."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        scale: float,
        options: LossOptions,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        core = _choose_core(hidden_ND.device, options)
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and needs_bias else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        num_rows, size = len(hidden_ND), _choose_rows(hidden_ND, weight_VD, needs_weight, options)
        buffer_CV = hidden_ND.new_empty(min(size, num_rows), len(weight_VD))
        for start in range(0, num_rows, size):
            piece = slice(start, min(start + size, num_rows))
            logits = torch.mm(hidden_ND[piece], weight_VD.T, out=buffer_CV[: piece.stop - start])
            if bias_V is not None:
                logits += bias_V
            loss, grad_logits = core(logits, labels_N[piece], scale, options.softcap, options.z_weight)
            total += loss
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[piece])
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad_logits.T, hidden_ND[piece], is_sum=size < num_rows)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.scale, ctx.dtypes = scale, (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients already carry `scale`; only what the caller asks beyond it is left to multiply."""
        rest = None
        if grad_output.device.type != "cpu" or float(grad_output.numpy()) != float(np.float32(ctx.scale)):
            rest = grad_output / ctx.scale
        grads = [_finish(grad, rest, dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return *grads, None, None, None


def compute_loss_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    scale: float = 1.0,
    options: LossOptions | None = None,
) -> Tensor:
    """Returns the summed cross-entropy as a float32 scalar.

    Args:
        hidden_ND: Hidden states after the final norm.
        weight_VD: Head, in the dtype of the hidden states.
        labels_N: Token ids or IGNORED.
        bias_V: Bias of the head, where it has one.
        scale: What the caller is going to multiply the sum by before `backward`; knowing it here saves a pass over the
            gradients. Another factor is still right, only slower.
        options: Soft-cap, z-loss, compilation.
    """
    loss: Tensor = LinearCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, labels_N, float(scale), options or LossOptions()
    )
    return loss


def make_labels(input_ids_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
    """Next-token labels inside each document; the last token of a document and padding have none (IGNORED).

    Args:
        input_ids_BT: Token ids.
        document_ids_BT: Document of each position within its row; -1 is padding.
    """
    labels = torch.full_like(input_ids_BT, IGNORED)
    same = (document_ids_BT[:, 1:] == document_ids_BT[:, :-1]) & (document_ids_BT[:, 1:] >= 0)
    labels[:, :-1] = torch.where(same, input_ids_BT[:, 1:], labels[:, :-1])
    return labels


def _choose_rows(hidden_ND: Tensor, weight_VD: Tensor, needs_weight: bool, options: LossOptions) -> int:
    """Positions of a chunk: as many as are allowed, or equal parts of all of them where they do not fit into one."""
    num_rows, (vocab_size, width) = len(hidden_ND), weight_VD.shape
    device_type = hidden_ND.device.type
    summed = count_rows_of_sum(width, weight_VD.element_size(), trains_head=needs_weight, fused=options.compiled)
    most = choose_chunk_rows(device_type, vocab_size, rows_of_sum=summed)
    if not summed and device_type == "cpu":
        return most
    return -(-num_rows // -(-num_rows // most))  # equal parts, since each size is compiled once


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, is_sum: bool) -> Tensor:
    """`total + left @ right`, summed in float32; one product that is not of a sum keeps its dtype.

    A GPU's products add to a float32 sum as they leave the chip; on a CPU only float32's do.
    """
    widens = left.device.type == "cuda" and left.dtype != torch.float32
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32) if is_sum and widens else left @ right
    if widens:
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    if total.dtype == left.dtype == torch.float32:
        return total.addmm_(left, right)
    total = total.float()
    size = max(1, PRODUCT_ELEMENTS // right.shape[1]) if total.device.type == "cpu" else len(left)
    for part, rows in zip(total.split(size), left.split(size)):
        part.add_(rows @ right)
    return total


def _chunk(
    logits_NV: Tensor, labels_N: Tensor, scale: float, softcap: float | None, z_weight: float
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient times `scale` of the raw logits, of one chunk."""
    raw = logits_NV.float()
    capped = raw if softcap is None else raw.div_(softcap).tanh_().mul_(softcap)
    valid = (labels_N != IGNORED).float()
    target = labels_N.clamp_min(0)[:, None]
    picked = capped.gather(1, target)[:, 0]
    # one exponential for the sum and the gradient, in place where the logits are not needed again
    largest = capped.amax(dim=-1, keepdim=True)
    grad = (capped.sub_(largest) if softcap is None else capped - largest).exp_()
    total = grad.sum(dim=-1, keepdim=True)
    log_sum = (largest + total.log())[:, 0]
    losses = log_sum - picked + z_weight * log_sum.square()
    factor = valid * scale
    # softmax * (1 + 2 z lse) - onehot
    grad *= ((1 + 2 * z_weight * log_sum) * factor)[:, None] / total
    grad.scatter_add_(1, target, -factor[:, None])
    if softcap is not None:
        grad *= capped.div_(softcap).square_().neg_().add_(1)
    return (losses * valid).sum(), grad if grad.dtype == logits_NV.dtype else logits_NV.copy_(grad)


def _chunk_fused(
    logits_NV: Tensor, labels_N: Tensor, scale: Tensor, softcap: float | None, z_weight: float
) -> tuple[Tensor, Tensor]:
    """As `_chunk`, for the compiler: no scatter; one read for the sum, one for the gradient, written in place."""
    raw = logits_NV.float()
    capped = raw if softcap is None else torch.tanh(raw / softcap) * softcap
    valid = (labels_N != IGNORED).float()
    target = labels_N.clamp_min(0)[:, None]
    log_sum = torch.logsumexp(capped, dim=-1)
    losses = log_sum - capped.gather(1, target)[:, 0] + z_weight * log_sum.square()
    is_target = torch.arange(logits_NV.shape[1], device=logits_NV.device)[None, :] == target
    grad = torch.exp(capped - log_sum[:, None]) * (1 + 2 * z_weight * log_sum)[:, None] - is_target.float()
    if softcap is not None:
        grad = grad * (1 - (capped / softcap).square())
    logits_NV.copy_(grad * (valid * scale)[:, None])
    return (losses * valid).sum(), logits_NV


def _finish(grad: Tensor | None, rest: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient times what was not known before, in its tensor's dtype, without a copy between."""
    if grad is None or rest is None:
        return None if grad is None else grad.to(dtype)
    return torch.mul(grad, rest.to(grad.dtype), out=torch.empty_like(grad, dtype=dtype))


def _choose_core(device: torch.device, options: LossOptions) -> Callable[..., tuple[Tensor, Tensor]]:
    """How a chunk of logits becomes its loss and its gradient: in one launch on a GPU, compiled, or as it is written."""
    if device.type == "cuda" and find_spec("triton"):
        from layerplan.train.loss_kernel import turn_into_gradient

        return partial(turn_into_gradient, ignored=IGNORED)
    return _compiled_core() if options.compiled else _chunk


@lru_cache(maxsize=1)
def _compiled_core() -> Callable[..., tuple[Tensor, Tensor]]:
    compiled = torch.compile(_chunk_fused, dynamic=False)

    def core(
        logits_NV: Tensor, labels_N: Tensor, scale: float, softcap: float | None, z_weight: float
    ) -> tuple[Tensor, Tensor]:
        return compiled(logits_NV, labels_N, torch.full((), scale, device=logits_NV.device), softcap, z_weight)

    return core
