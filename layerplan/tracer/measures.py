"""The papers' formulas on plain tensors, in float64. Shapes: B probes, L layers, V vocabulary, D hidden."""

from __future__ import annotations

import torch
from torch import Tensor

TASK_PARTICLE_EPS = 1e-8
SENSITIVITY_EPS = 1e-4


def compute_task_particle(prob_LB: Tensor, denominator: str = "current") -> Tensor:
    """Ratio(l) = |P(l) - P(l-1)| / (P(l) + eps) for l = 1..L (Eq. 1): (L + 1, B) to (L, B).

    `previous` divides by P(l-1) instead.
    """
    prob = prob_LB.double()
    base = prob[1:] if denominator == "current" else prob[:-1]
    return (prob[1:] - prob[:-1]).abs() / (base + TASK_PARTICLE_EPS)


def compute_log_change(log_prob_LB: Tensor) -> Tensor:
    """|log P(l) - log P(l-1)|: bounded where Ratio explodes under suppression; (L + 1, B) to (L, B)."""
    return log_prob_LB.double().diff(dim=0).abs()


def compute_js(logits_BV: Tensor, perturbed_BV: Tensor, top_k: int) -> Tensor:
    """Jensen-Shannon divergence with natural logarithm on the union of both top-k sets, renormalised (Eq. 3-5): (B,).

    `top_k` 0 takes the whole vocabulary. Computed in float64; equal inputs give exactly 0.
    """
    p = torch.softmax(logits_BV.double(), -1)
    q = torch.softmax(perturbed_BV.double(), -1)
    if 0 < top_k < p.shape[-1]:
        support = torch.zeros_like(p, dtype=torch.bool)
        support.scatter_(-1, p.topk(top_k).indices, True)
        support.scatter_(-1, q.topk(top_k).indices, True)
        p, q = p * support, q * support
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    middle = (p + q) / 2
    return (_kl(p, middle) + _kl(q, middle)) / 2


def compute_layer_sensitivity(js_LB: Tensor) -> Tensor:
    """LS(l) = |JS(l) - JS(l-1)| / (JS(l-1) + eps) for l = 1..L (Eq. 6): (L + 1, B) to (L, B)."""
    js = js_LB.double()
    return js.diff(dim=0).abs() / (js[:-1] + SENSITIVITY_EPS)


def find_longest_run(values: list[float], threshold: float) -> tuple[int, int]:
    """Half-open range of the longest run above the threshold, the first on a tie; (0, 0) when there is none."""
    best = (0, 0)
    start: int | None = None
    for index, value in enumerate([*values, float("-inf")]):
        if value > threshold and start is None:
            start = index
        elif value <= threshold and start is not None:
            if index - start > best[1] - best[0]:
                best = (start, index)
            start = None
    return best


def compute_output_basis(weight_VD: Tensor, labels_B: Tensor) -> Tensor:
    """Output semantic basis of labels: row i of pinv(W), that is (W^T W)^-1 w_i, by a float64 Cholesky: (B, D)."""
    weight = weight_VD.double()
    gram = weight.T @ weight
    gram += torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device) * gram.diagonal().mean() * 1e-12
    return torch.cholesky_solve(weight[labels_B].T, torch.linalg.cholesky(gram)).T


def compute_semantic_deviations(
    state_BD: Tensor, basis_BD: Tensor, weight_VD: Tensor, labels_B: Tensor
) -> dict[str, Tensor]:
    """SALF deviations of a state from its gold label: `cosine`, `ce`, `rank`, each (B,).

    `cosine` is 1 - cos(f, v); `ce` the cross-entropy of the cosine similarities to every label's head row; `rank` the
    number of labels whose row is nearer than the gold one.
    """
    state = torch.nn.functional.normalize(state_BD.double(), dim=-1)
    basis = torch.nn.functional.normalize(basis_BD.double(), dim=-1)
    rows = torch.nn.functional.normalize(weight_VD.double(), dim=-1)
    similarity_BV = state @ rows.T
    gold_B = similarity_BV.gather(1, labels_B[:, None])
    return {
        "cosine": 1 - (state * basis).sum(-1),
        "ce": torch.logsumexp(similarity_BV, -1) - gold_B[:, 0],
        "rank": (similarity_BV > gold_B).sum(-1).double(),
    }


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0.0).sum(-1)
