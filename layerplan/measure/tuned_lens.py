"""How much nearer each layer brings the prediction, read through an affine translator of its own (the tuned lens).

The residual stream after layer l is carried to that after the last layer by an affine map, and read by the model's own
head. Belrose et al. (2023) train the maps by gradient descent on the KL divergence to the final prediction; here they are
the least squares solution, which costs one pass over the text in place of hundreds. Maps are fitted on one half of the
rows and asked on the other, both ways round, so that a map of many parameters does not flatter a layer. The gain of layer
l is what the loss falls by from h_(l-1) to h_l. Shapes: N positions, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE = 1e-3
"""Of the mean variance of a state's channels, added to all of them: more channels than positions have a solution."""
LENS_ROWS = 64
"""Positions that pass the head at once."""


@dataclass(frozen=True)
class Translator:
    """An affine map of states to final states."""

    mean_D: Tensor
    """Of the states it was fitted on."""
    target_D: Tensor
    """Mean of the final states."""
    matrix_DD: Tensor
    """What a state's distance from the mean is multiplied with."""

    def __call__(self, states_ND: Tensor) -> Tensor:
        """Carries states to where they would end."""
        return self.target_D + (states_ND - self.mean_D) @ self.matrix_DD


def fit_translator(states_ND: Tensor, final_ND: Tensor) -> Translator:
    """The affine map that comes nearest to the final states in the sense of least squares, in float64.

    It departs from the identity, which the data of few positions leave where they say nothing: what is fitted is
    final - state.
    """
    states, final = states_ND.double(), final_ND.double()
    mean, target = states.mean(0), final.mean(0)
    centred, gap = states - mean, (final - target) - (states - mean)
    gram = centred.T @ centred
    gram += torch.eye(len(gram), dtype=gram.dtype) * (RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    shift = torch.cholesky_solve(centred.T @ gap, torch.linalg.cholesky(gram))
    matrix = shift + torch.eye(len(gram), dtype=gram.dtype)
    return Translator(mean.to(states_ND), target.to(states_ND), matrix.to(states_ND))


@torch.no_grad()
def compute_lens_gains(
    fitted_LND: Tensor, asked_LND: Tensor, labels_N: Tensor, lens: Callable[[Tensor], Tensor]
) -> list[list[float]]:
    """Fall of the loss by layer at every asked position, in nats.

    Args:
        fitted_LND: L + 1 states of the positions the translators are fitted on.
        asked_LND: Those of the positions they are asked at.
        labels_N: Next token of each asked position.
        lens: Final states to logits.

    Returns:
        (N, L); the sum over layers is the loss read before the first layer less the model's own.
    """
    losses = []
    for states, asked in zip(fitted_LND[:-1], asked_LND[:-1]):
        losses.append(_read_losses(fit_translator(states, fitted_LND[-1])(asked), labels_N, lens))
    losses.append(_read_losses(asked_LND[-1], labels_N, lens))
    gains = -torch.stack(losses).diff(dim=0).T
    return [[float(value) for value in row] for row in gains]


def _read_losses(states_ND: Tensor, labels_N: Tensor, lens: Callable[[Tensor], Tensor]) -> Tensor:
    pieces = zip(states_ND.split(LENS_ROWS), labels_N.split(LENS_ROWS))
    return torch.cat([F.cross_entropy(lens(states), labels, reduction="none") for states, labels in pieces])
