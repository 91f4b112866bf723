"""SALF's budgets: how many samples start their backward pass at each layer (section 3.4 of the paper, Algorithm 4).

A sample with start layer e trains layers [e, L) and freezes the ones below. A budget gives every start layer a number
of samples; a filling says in which order they are handed out when the data do not fill it. Layers are 0-based, counts
are samples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from layerplan.errors import PlanError

BudgetKind = Literal["half", "geometric", "arithmetic"]
Filling = Literal["depth_first", "breadth_first"]


def allocate_start_layers(num_samples: int, num_layers: int, kind: BudgetKind, filling: Filling) -> list[int]:
    """Returns how many samples start at each layer; the counts add up to `num_samples`.

    `half` gives every layer the same number, and one sample of the remainder to each of the first layers. `geometric`
    gives layer e up to 2^e samples. `arithmetic` gives it e + 1 samples in each whole cycle of L (L + 1) / 2; the
    samples left over fill one more cycle. `breadth_first` fills a layer before it goes to the next, shallow ones first;
    `depth_first` hands out one sample to each layer in turn. With `breadth_first` the paper's `arithmetic` numbers are
    not reproduced: its text does not say how it cuts the cycles, and here only the last, unfinished one is affected.

    Raises:
        PlanError: When a count is not positive.
    """
    for name, value in (("num_samples", num_samples), ("num_layers", num_layers)):
        if value < 1:
            raise PlanError(f"{name}={value}: must be at least 1")
    if kind == "half":
        each, rest = divmod(num_samples, num_layers)
        return [each + (layer < rest) for layer in range(num_layers)]
    if kind == "geometric":
        capacity = [min(2**layer, num_samples) for layer in range(num_layers)]
        counts = _fill(num_samples, capacity, filling)
        counts[-1] += num_samples - sum(counts)  # more samples than 2^L - 1: the deepest layer takes what is left
        return counts
    cycle = num_layers * (num_layers + 1) // 2
    whole, rest = divmod(num_samples, cycle)
    last = _fill(rest, [layer + 1 for layer in range(num_layers)], filling)
    return [whole * (layer + 1) + last[layer] for layer in range(num_layers)]


def assign_start_layers(eof_layers: Sequence[int], counts: Sequence[int], *, seed: int) -> list[int]:
    """Gives every sample a start layer (Algorithm 4).

    Layer by layer, shallow first: samples whose end-of-freezing layer is not above the layer take its places in their
    order; places left are filled with samples drawn at random from those without a start layer.

    Args:
        eof_layers: End-of-freezing layer of each sample.
        counts: Places of each layer, from `allocate_start_layers`.
        seed: Of the draw.

    Raises:
        PlanError: When the places do not add up to the samples.
    """
    if sum(counts) != len(eof_layers):
        raise PlanError(f"counts: {sum(counts)} places for {len(eof_layers)} samples")
    rng = random.Random(seed)
    starts = [-1] * len(eof_layers)
    waiting = list(range(len(eof_layers)))
    for layer, places in enumerate(counts):
        matching = [sample for sample in waiting if eof_layers[sample] <= layer][:places]
        taken = set(matching)
        others = [sample for sample in waiting if sample not in taken]
        drawn = rng.sample(others, places - len(matching))
        for sample in (*matching, *drawn):
            starts[sample] = layer
        waiting = [sample for sample in waiting if starts[sample] < 0]
    return starts


def _fill(num_samples: int, capacity: Sequence[int], filling: Filling) -> list[int]:
    if filling == "breadth_first":
        return _fill_in_order(num_samples, capacity)
    return _fill_in_turns(num_samples, capacity)


def _fill_in_order(num_samples: int, capacity: Sequence[int]) -> list[int]:
    counts, left = [], num_samples
    for room in capacity:
        counts.append(min(room, left))
        left -= counts[-1]
    return counts


def _fill_in_turns(num_samples: int, capacity: Sequence[int]) -> list[int]:
    """One sample to each layer that has room, again and again; whole turns are taken at once."""
    counts, left = [0] * len(capacity), num_samples
    while left and (open_layers := [layer for layer, room in enumerate(capacity) if counts[layer] < room]):
        turns = min(capacity[layer] - counts[layer] for layer in open_layers)
        turns = min(turns, left // len(open_layers))
        if turns == 0:
            for layer in open_layers[:left]:
                counts[layer] += 1
            return counts
        for layer in open_layers:
            counts[layer] += turns
        left -= turns * len(open_layers)
    return counts
