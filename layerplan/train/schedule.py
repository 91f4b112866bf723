"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from layerplan.config.train import ScheduleConfig


def compute_lr_scale(step: int, max_steps: int, config: ScheduleConfig) -> float:
    """Returns the share of the peak learning rate at `step` (0-based), in [0, 1].

    A linear warm-up reaches 1 at its last step; the shape after it ends at `min_ratio` on the last step.
    """
    warmup = math.ceil(config.warmup_ratio * max_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - 1 - warmup)
    return config.min_ratio + (1 - config.min_ratio) * _shape(min(progress, 1.0), config)


def compute_rewarm_scale(step: int, start: int, num_steps: int) -> float:
    """Share of the scheduled rate at `step` after a change of plan at `start`: rises linearly to 1 over `num_steps`."""
    return min(1.0, (step - start + 1) / num_steps) if num_steps else 1.0


def _shape(progress: float, config: ScheduleConfig) -> float:
    if config.type == "constant":
        return 1.0
    if config.type == "linear":
        return 1 - progress
    if config.type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    decay_start = 1 - config.decay_ratio
    return 1.0 if progress < decay_start else (1 - progress) / config.decay_ratio
