"""A short training of everything, which says what each layer would save: `pilot`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerplan.config.train import OptimizerConfig
from layerplan.measure.gradients import SavedLoss, mean_loss, run_logits
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.train.optim import build_optimizer, compute_clip_scale, compute_grad_norm

MIN_STEPS = 4
"""Adam's first steps move every weight by the learning rate, whatever its gradient."""


def count_pilot_steps(max_steps: int, share: float) -> int:
    """Steps of the pilot of a training of `max_steps`."""
    return max(MIN_STEPS, math.ceil(share * max_steps))


def run_pilot(model: nn.Module, steps_SBT: Sequence[Tensor], config: OptimizerConfig) -> list[list[float]]:
    """Trains every parameter on one batch a step and measures the loss that each layer saved.

    Optimizer and clipping are the config's, at its peak learning rate throughout: a schedule's first steps would weigh
    the batches they fall on.

    Args:
        model: Changed by this.
        steps_SBT: Rows of each step.
        config: Its optimizer.

    Returns:
        Nats saved to first order, -gradient times movement, by step and layer: (S, L).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    optimizer = build_optimizer(model, config)
    saved = SavedLoss(list(find_decoder_parts(model).layers))
    found = []
    for ids_BT in steps_SBT:
        optimizer.zero_grad(set_to_none=True)
        _accumulate(model, ids_BT)
        saved.before_step()
        _update(model, optimizer, config.max_grad_norm)
        found.append(saved.after_step())
    return found


def _accumulate(model: nn.Module, ids_BT: Tensor) -> None:
    """Gradients of the mean loss, one row at a time: the logits of a batch would be its largest tensor."""
    with torch.enable_grad():
        for row_1T in ids_BT.split(1):
            (mean_loss(run_logits(model, row_1T), row_1T[:, 1:]) / len(ids_BT)).backward()


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    gradients = [parameter for parameter in model.parameters() if parameter.grad is not None]
    scale = compute_clip_scale(compute_grad_norm(gradients), max_norm)
    optimizer.step(grad_scale=scale)
