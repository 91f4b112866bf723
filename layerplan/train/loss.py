"""Cross-entropy straight from hidden states, without ever holding all logits.

The logits of a batch are the largest tensor of a small model with a large vocabulary: 8 x 4,096 tokens times 151,936
entries in float32 are 18.5 GiB, and autograd would keep several of them. Here a chunk of positions is projected,
turned into its loss *and* its gradient at once, and dropped. Shapes: N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
CHUNK_LOGITS = 32 * 2**20
"""Logits held at once; a chunk has about CHUNK_LOGITS / V positions."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `softcap(hidden_ND @ weight_VD.T)` against labels_N, ignoring IGNORED."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, softcap: float | None
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        size = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], size):
            piece = slice(start, start + size)
            loss, grad_logits = _chunk(hidden_ND[piece] @ weight_VD.T, labels_N[piece], softcap)
            total += loss
            if grad_hidden is not None:
                grad_hidden[piece] = grad_logits.to(hidden_ND.dtype) @ weight_VD
            if grad_weight is not None:
                grad_weight += (grad_logits.to(hidden_ND.dtype).T @ hidden_ND[piece]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_output.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_output).to(ctx.weight_dtype),
            None,
            None,
        )


def compute_loss_sum(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Returns the summed cross-entropy as a float32 scalar; divide by the number of labels yourself."""
    loss: Tensor = LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, softcap)
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


def _chunk(logits_NV: Tensor, labels_N: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the raw logits of one chunk, in float32."""
    raw = logits_NV.float()
    capped = raw if softcap is None else torch.tanh(raw / softcap) * softcap
    valid = labels_N != IGNORED
    target = labels_N.clamp_min(0)[:, None]
    log_sum = torch.logsumexp(capped, dim=-1)
    losses = log_sum - capped.gather(1, target)[:, 0]
    grad = torch.exp(capped - log_sum[:, None])
    grad.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=grad.dtype))
    if softcap is not None:
        grad *= 1 - (capped / softcap) ** 2
    grad *= valid[:, None]
    return (losses * valid).sum(), grad
