"""Which prompts begin alike, and which of their rests go through a model together: token ids in, indices out.

The questions of a subject share its header and its solved examples. Sorted prompts whose common beginnings are compared
with their neighbours' form a tree of intervals (Abouelhoda, Kurtz and Ohlebusch 2004, "Replacing suffix trees with
enhanced suffix arrays"); each interval is either one group or the groups of its parts, whichever saves more tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts that begin with the same tokens."""

    num_shared: int
    """Tokens that are read once for all of them; each prompt has at least one more. 0 for a prompt by itself."""
    members: tuple[int, ...]
    """Indices of the prompts, the longest first."""


def group_by_prefix(prompts: Sequence[Sequence[int]], *, min_saved: int) -> list[PrefixGroup]:
    """Puts every prompt into one group; the group with the longest prompt comes first.

    Args:
        prompts: Token ids.
        min_saved: Tokens that a group must save, to be worth a forward pass for what it shares.
    """
    order = sorted(range(len(prompts)), key=lambda index: (list(prompts[index]), index))
    arrays = [np.asarray(prompts[index], dtype=np.int64) for index in order]
    shared = [_count_shared(*pair) for pair in pairwise(arrays)]
    groups, covered = [], 0
    for start, stop, common in _choose_intervals(shared, min_saved):
        groups += [PrefixGroup(0, (index,)) for index in order[covered:start]]
        members = sorted(order[start:stop], key=lambda index: (-len(prompts[index]), index))
        groups.append(PrefixGroup(common, tuple(members)))
        covered = stop
    groups += [PrefixGroup(0, (index,)) for index in order[covered:]]
    return sorted(groups, key=lambda group: (-len(prompts[group.members[0]]), group.members[0]))


def split_members(
    group: PrefixGroup, lengths: Sequence[int], *, max_rest_tokens: int, max_held_tokens: int, max_padding: int
) -> list[list[int]]:
    """Cuts a group into batches whose rests are padded on the right to the longest.

    Args:
        group: What is cut.
        lengths: Tokens of every prompt.
        max_rest_tokens: Of one batch, padding included.
        max_held_tokens: Keys and values of one batch, the shared ones counted for every prompt.
        max_padding: Of one prompt.
    """
    batches: list[list[int]] = []
    for index in group.members:
        if batches:
            longest, size = lengths[batches[-1][0]], len(batches[-1]) + 1
            fits = size * (longest - group.num_shared) <= max_rest_tokens and size * longest <= max_held_tokens
            if fits and longest - lengths[index] <= max_padding:
                batches[-1].append(index)
                continue
        batches.append([index])
    return batches


@dataclass
class _Interval:
    """Neighbours in sorted order that share `common` tokens, and the best groups found inside."""

    common: int
    start: int
    saved: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def take(self, inner: _Interval) -> None:
        self.saved += inner.saved
        self.parts += inner.parts

    def close(self, stop: int, min_saved: int) -> None:
        """Becomes one group where that saves no less than its parts, and groups of what lies between them, do."""
        between = zip([self.start, *(part[1] for part in self.parts)], [*(part[0] for part in self.parts), stop])
        rest = [(first, last, self.common) for first, last in between if last - first > 1]
        rest = [part for part in rest if _count_saved(*part) >= min_saved]
        self.parts = sorted(self.parts + rest)
        self.saved += sum(_count_saved(*part) for part in rest)
        saved = _count_saved(self.start, stop, self.common)
        if saved >= max(self.saved, min_saved):
            self.saved, self.parts = saved, [(self.start, stop, self.common)]


def _count_saved(start: int, stop: int, common: int) -> int:
    return max(0, stop - start - 1) * common


def _choose_intervals(shared: Sequence[int], min_saved: int) -> list[tuple[int, int, int]]:
    """Groups as (start, stop, tokens shared) out of what each of the sorted prompts shares with the next."""
    open_ones = [_Interval(0, 0)]
    for position, common in enumerate([*shared, 0]):
        start, inner = position, None
        while common < open_ones[-1].common:
            inner = open_ones.pop()
            inner.close(position + 1, min_saved)
            start = inner.start
            if common <= open_ones[-1].common:
                open_ones[-1].take(inner)
                inner = None
        if common > open_ones[-1].common:
            open_ones.append(_Interval(common, start))
            if inner is not None:
                open_ones[-1].take(inner)
    return open_ones[0].parts


def _count_shared(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Equal tokens at the beginning; the last token of either is left to be read by itself."""
    most = min(len(one), len(other)) - 1
    different = np.flatnonzero(one[: max(most, 0)] != other[: max(most, 0)])
    return int(different[0]) if len(different) else max(most, 0)
