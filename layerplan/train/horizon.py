"""A run that is given more steps: from where it stands on, the learning rate follows the schedule of the new number."""

from __future__ import annotations

from layerplan.config.train import TrainConfig
from layerplan.train.schedule import compute_lr_scale
from layerplan.train.state import TrainState


def extend_horizon(state: TrainState, config: TrainConfig, finished_step: int | None) -> tuple[TrainState, str]:
    """Notes in the state which number of steps the schedule has from here on.

    Args:
        state: Of a run that begins or continues.
        config: Its `max_steps` is the schedule's horizon.
        finished_step: Step at which an earlier call finished the run, for states that do not know their horizon.

    Returns:
        The state, and a line on what changes, or nothing.
    """
    known = state.horizons[-1][1] if state.horizons else finished_step if state.step else None
    if state.horizons and known == config.max_steps:
        return state, ""
    horizons = (*state.horizons, (state.step, config.max_steps))
    line = "" if known in (None, config.max_steps) else _describe(state.step, known, config)
    return state.model_copy(update={"horizons": horizons}), line


def _describe(step: int, earlier: int | None, config: TrainConfig) -> str:
    assert earlier is not None
    before, after = (_rate(step - 1, earlier, config), _rate(step, config.max_steps, config))
    return (
        f"train.max_steps is {config.max_steps}, it was {earlier}: up to step {step} the learning rate followed the"
        f" {config.schedule.type} schedule of {earlier} steps, from step {step + 1} on it follows that of"
        f" {config.max_steps}: {before:.3g} at step {step}, {after:.3g} at step {step + 1}"
    )


def _rate(index: int, max_steps: int, config: TrainConfig) -> float:
    return config.optimizer.learning_rate * compute_lr_scale(index, max_steps, config.schedule)
