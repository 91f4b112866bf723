"""How many workers train, from which step on: noted in the state, so that a change of it is told wherever a run is looked at."""

from __future__ import annotations

from collections.abc import Sequence

from layerplan.train.state import TrainState


def note_world(state: TrainState, world_size: int) -> tuple[TrainState, str]:
    """Notes how many workers train from the state's step on.

    Returns:
        The state, and a line on what changes, or nothing.
    """
    earlier = state.worlds[-1][1] if state.worlds else None
    if earlier == world_size:
        return state, ""
    kept = tuple(each for each in state.worlds if each[0] < state.step)
    line = ""
    if earlier is not None:
        line = f"{world_size} worker{'s' if world_size > 1 else ''} from step {state.step + 1} on, {earlier} until then"
    return state.model_copy(update={"worlds": (*kept, (state.step, world_size))}), line


def describe_worlds(worlds: Sequence[tuple[int, int]]) -> str:
    """How many workers trained which steps, in a phrase; empty where nothing was noted."""
    first = [f"{workers} worker{'s' if workers > 1 else ''}" for _, workers in worlds[:1]]
    return ", ".join(first + [f"{workers} from step {step + 1} on" for step, workers in worlds[1:]])
