"""What ranks have to agree on before a step, known from its rows alone and exchanged between hosts, never by the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class StepCounts:
    """Numbers of one step: of a rank, or of all of them."""

    labels: int
    """Positions that have a label."""
    tokens: int
    """Without padding."""
    num_batches: int
    """Micro-batches; of all ranks, the most that one has."""
    wants_stop: bool
    """Whether rank 0 was asked to end after this step."""


class Agreement:
    """The counts of all ranks, on their way; it is asked for while the step before is computed."""

    def __init__(self, mine: StepCounts, world_size: int, group: dist.ProcessGroup | None) -> None:
        """Begins the exchange; every rank makes one for every step.

        Args:
            mine: Of this rank.
            world_size: Ranks.
            group: A gloo group of all ranks; the default group, which then has to be one, without it.
        """
        self._mine = mine
        self._work: Any = None
        if world_size > 1:
            values = torch.tensor([mine.labels, mine.tokens, mine.num_batches, int(mine.wants_stop)], dtype=torch.int64)
            self._all = [torch.empty_like(values) for _ in range(world_size)]
            self._work = dist.all_gather(self._all, values, group=group, async_op=True)

    def wait(self) -> StepCounts:
        """The counts of all ranks together."""
        if self._work is None:
            return self._mine
        self._work.wait()
        labels, tokens, num_batches, stops = zip(*(each.numpy().tolist() for each in self._all))
        return StepCounts(sum(labels), sum(tokens), max(num_batches), any(stops))


def agree_on_fault(fault: str, world_size: int) -> str:
    """The fault of the lowest rank that found one, on every rank; empty when none did."""
    if world_size == 1:
        return fault
    faults: list[str] = [""] * world_size
    dist.all_gather_object(faults, fault)
    return next((each for each in faults if each), "")
