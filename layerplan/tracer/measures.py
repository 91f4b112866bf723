"""The papers' formulas on plain tensors, their sums in float64. Shapes: B probes, L layers, V vocabulary, D hidden."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from layerplan.models.semantic_bases import SemanticBases, scale_to_units

TASK_PARTICLE_EPS = 1e-8
SENSITIVITY_EPS = 1e-4
Deviation = Literal["cosine", "ce", "rank"]
DEVIATIONS: tuple[Deviation, ...] = ("cosine", "ce", "rank")


def compute_task_particle(prob_LB: Tensor, denominator: str = "current", eps: float = TASK_PARTICLE_EPS) -> Tensor:
    """Ratio(l) = |P(l) - P(l-1)| / (P(l) + eps) for l = 1..L (Eq. 1): (L + 1, B) to (L, B).

    `previous` divides by P(l-1) instead.
    """
    prob = prob_LB.double()
    base = prob[1:] if denominator == "current" else prob[:-1]
    return (prob[1:] - prob[:-1]).abs() / (base + eps)


def compute_log_prob(logits_BV: Tensor, target_B: Tensor) -> Tensor:
    """Log-probability of one label per row, summed in float64 without a float64 copy of the logits: (B,)."""
    highest_B1 = logits_BV.max(-1, keepdim=True).values
    total_B = (logits_BV - highest_B1).exp_().sum(-1, dtype=torch.float64)
    return (logits_BV.gather(-1, target_B[:, None]) - highest_B1)[:, 0].double() - total_B.log()


def compute_entropy(logits_BV: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, float64: (B,)."""
    log_prob = torch.log_softmax(logits_BV.double(), -1)
    return -(log_prob.exp() * log_prob).nansum(-1)


def compute_js(logits_BV: Tensor, perturbed_BV: Tensor, top_k: int) -> Tensor:
    """Jensen-Shannon divergence with natural logarithm on the union of both top-k sets, renormalised (Eq. 3-5): (B,).

    `top_k` 0 takes the whole vocabulary. Computed in float64; equal inputs give exactly 0. Renormalising cancels the
    softmax denominator, so a support of 2 k logits is all that is read of a vocabulary.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        first, second = logits_BV.topk(top_k).indices, perturbed_BV.topk(top_k).indices
        is_repeated = (second[:, :, None] == first[:, None, :]).any(-1)
        is_left_out = torch.cat([torch.zeros_like(is_repeated), is_repeated], -1)
        support = torch.cat([first, second], -1)
        logits_BV, perturbed_BV = (
            values.gather(-1, support).double().masked_fill(is_left_out, float("-inf"))
            for values in (logits_BV, perturbed_BV)
        )
    p = torch.softmax(logits_BV.double(), -1)
    q = torch.softmax(perturbed_BV.double(), -1)
    middle = (p + q) / 2
    return (_kl(p, middle) + _kl(q, middle)) / 2


def compute_layer_sensitivity(js_LB: Tensor, eps: float = SENSITIVITY_EPS) -> Tensor:
    """LS(l) = |JS(l) - JS(l-1)| / (JS(l-1) + eps) for l = 1..L (Eq. 6): (L + 1, B) to (L, B)."""
    js = js_LB.double()
    return js.diff(dim=0).abs() / (js[:-1] + eps)


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


def compute_deviations(bases: SemanticBases, state_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """Deviations of a state from its gold label by kind, each (B,) in float64 (SALF, section 3.1).

    `cosine` is 1 - cos(f, v) with the label's output basis v; `ce` the cross-entropy of the cosine similarities to
    every label's basis (Algorithm 1); `rank` the number of labels whose basis is nearer than the gold one's.
    """
    state = scale_to_units(state_BD.double())
    similarity_BV = state.float() @ bases.get_units().T
    gold_B = similarity_BV.gather(1, labels_B[:, None])
    return {
        "cosine": 1 - (state * bases.compute_units(labels_B)).sum(-1),
        "ce": (torch.logsumexp(similarity_BV, -1) - gold_B[:, 0]).double(),
        "rank": (similarity_BV > gold_B).sum(-1).double(),
    }


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0.0).sum(-1)
