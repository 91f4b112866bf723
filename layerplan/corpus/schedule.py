"""The order of training as a pure function: (row counts, weights, number of lanes, seed, step) -> row ids.

A *stream* reads its rows again and again, each exactly once per epoch, with no gap: epoch e is places
[e * num_rows, (e + 1) * num_rows) of the stream, and may begin in the middle of a batch. Within an epoch the full row
groups are permuted by (seed, epoch) and taken `num_lanes` at a time; place p of such a block is row p div num_lanes of
its group p mod num_lanes. So lane j streams a permutation of row groups of its own, one row per step, and few groups are
open at a time. Row groups that are left over, or short, end the epoch in the same manner.

Without weights there is one stream over the whole store, and step s takes places [s * num_lanes, (s + 1) * num_lanes).
With weights each source is a stream, and a repeating pattern of slots says which stream a slot takes its next row from.
World size does not occur here: rank r of W takes the slots j with j mod W = r, so any W up to the number of lanes
trains on the same batches; where W does not divide it, the first ranks have a row more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from layerplan.errors import CorpusError

PATTERN_SLOTS = 4096
"""Slots in the pattern of a mixture, so weights are kept to 1 part in 4,096, and no source has less than that."""

Ids = NDArray[np.int64]


def check_enough(num_rows: int, global_batch_size: int) -> None:
    """Raises `CorpusError` when a store has fewer rows than a step takes."""
    if num_rows < global_batch_size:
        raise CorpusError(
            f"token store: has {num_rows} rows, a step takes train.global_batch_size={global_batch_size}; give more text,"
            " a shorter corpus.seq_len or a smaller batch"
        )


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of one source; row groups start anew with it."""

    num_rows: int
    weight: float | None = None


@dataclass(frozen=True)
class LaneSchedule:
    """The schedule of one run.

    Attributes:
        sources: Row counts in row order, and weights for all of them or none.
        rows_per_group: Rows in each row group but a source's last.
        num_lanes: Sequences in a global batch.
        seed: Seed of the permutations.
    """

    sources: tuple[RowRange, ...]
    rows_per_group: int
    num_lanes: int
    seed: int

    def __post_init__(self) -> None:
        check_enough(self.num_rows, self.num_lanes)
        if self.is_weighted and len(self.sources) > PATTERN_SLOTS:
            raise CorpusError(
                f"corpus.sources: {len(self.sources):,} have weights, at most {PATTERN_SLOTS:,} can be mixed"
            )
        if self.is_weighted and any(source.num_rows == 0 for source in self.sources):
            index = [source.num_rows for source in self.sources].index(0)
            raise CorpusError(f"corpus.sources.{index}: has a weight but no rows; every document of it was dropped")

    @property
    def num_rows(self) -> int:
        """Training rows of the store; ids 0..num_rows-1."""
        return sum(source.num_rows for source in self.sources)

    @property
    def is_weighted(self) -> bool:
        """Whether the sources have weights."""
        return self.sources[0].weight is not None

    def rows_at(self, step: int) -> Ids:
        """Row ids of the global batch at `step` (0-based): (num_lanes,), in lane order."""
        slots = np.arange(step * self.num_lanes, (step + 1) * self.num_lanes, dtype=np.int64)
        if not self.is_weighted:
            groups = list_row_groups(self.sources, self.rows_per_group)
            return _rows_at_places(slots, groups, self.num_lanes, (self.seed,))
        streams, places = self._split_slots(slots)
        rows = np.empty(self.num_lanes, dtype=np.int64)
        first = 0
        for index, source in enumerate(self.sources):
            mine = streams == index
            if mine.any():
                groups = list_row_groups((RowRange(source.num_rows),), self.rows_per_group)
                width = -(-self.num_lanes * int(_make_pattern(self._shares)[2][index]) // PATTERN_SLOTS)
                rows[mine] = first + _rows_at_places(places[mine], groups, width, (self.seed, index))
            first += source.num_rows
        return rows

    def rank_rows_at(self, step: int, rank: int, world_size: int) -> Ids:
        """The part of `rows_at(step)` that `rank` trains on: lanes j with j mod world_size = rank.

        Raises:
            CorpusError: When there are more workers than lanes.
        """
        self.count_rank_rows(rank, world_size)
        return self.rows_at(step)[rank::world_size]

    def count_rank_rows(self, rank: int, world_size: int) -> int:
        """Rows a rank trains on in a step.

        Raises:
            CorpusError: When there are more workers than lanes.
        """
        check_world(self.num_lanes, world_size)
        return len(range(rank, self.num_lanes, world_size))

    @property
    def _shares(self) -> tuple[float, ...]:
        weights = [source.weight or 0.0 for source in self.sources]
        return tuple(weight / sum(weights) for weight in weights)

    def _split_slots(self, slots: Ids) -> tuple[Ids, Ids]:
        """For each slot: which stream it reads, and the place within that stream."""
        streams, ranks, counts = _make_pattern(self._shares)
        rounds, within = np.divmod(slots, PATTERN_SLOTS)
        chosen = streams[within]
        return chosen, rounds * counts[chosen] + ranks[within]


def check_world(num_lanes: int, world_size: int) -> None:
    """Raises `CorpusError` when a worker would have no row of a step."""
    if world_size > num_lanes:
        raise CorpusError(f"world size {world_size} is above train.global_batch_size={num_lanes}: a worker needs a row")


@dataclass(frozen=True, eq=False)
class RowGroups:
    """First row and length of every row group: (groups,)."""

    first: Ids
    size: Ids


@lru_cache(maxsize=16)
def list_row_groups(sources: tuple[RowRange, ...], rows_per_group: int) -> RowGroups:
    """The row groups of consecutive sources."""
    firsts, sizes, start = [], [], 0
    for source in sources:
        first = np.arange(0, source.num_rows, rows_per_group, dtype=np.int64)
        firsts.append(start + first)
        sizes.append(np.minimum(rows_per_group, source.num_rows - first))
        start += source.num_rows
    return RowGroups(np.concatenate(firsts), np.concatenate(sizes))


def _rows_at_places(places: Ids, groups: RowGroups, width: int, seed: tuple[int, ...]) -> Ids:
    """Rows at places of an endless stream, `width` row groups open at a time."""
    num_rows = int(groups.size.sum())
    epochs, within = np.divmod(places, num_rows)
    rows = np.empty(len(places), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        mine = epochs == epoch
        rows[mine] = _rows_in_epoch(within[mine], groups, width, (*seed, epoch))
    return rows


def _rows_in_epoch(within: Ids, groups: RowGroups, width: int, seed: tuple[int, ...]) -> Ids:
    order, tail, size = _permute(groups, width, seed)
    block, place = np.divmod(within, width * size)
    local, lane = np.divmod(place, width)
    num_blocks = len(order) // width
    in_block = block < num_blocks
    rows = np.empty(len(within), dtype=np.int64)
    rows[in_block] = groups.first[order[block[in_block] * width + lane[in_block]]] + local[in_block]
    rows[~in_block] = tail[within[~in_block] - num_blocks * width * size]
    return rows


@lru_cache(maxsize=8)
def _permute(groups: RowGroups, width: int, seed: tuple[int, ...]) -> tuple[Ids, Ids, int]:
    """Full groups in the epoch's order, the rows of the last ones in order, and the size of a full group."""
    size = int(groups.size.max())
    full = np.flatnonzero(groups.size == size)
    order = np.random.default_rng(seed).permutation(full)
    left = np.concatenate([order[len(order) // width * width :], np.flatnonzero(groups.size < size)])
    order = order[: len(order) // width * width]
    if len(left) == 0:
        return order, np.empty(0, dtype=np.int64), size
    local = np.concatenate([np.arange(groups.size[group]) for group in left])
    lane = np.repeat(np.arange(len(left)), groups.size[left])
    by_local = np.lexsort((lane, local))
    return order, (groups.first[left[lane]] + local)[by_local], size


@lru_cache(maxsize=8)
def _make_pattern(shares: Sequence[float]) -> tuple[Ids, Ids, Ids]:
    """The pattern of a mixture: per slot its stream and its rank among that stream's slots; per stream its slots.

    Counts are rounded by largest remainder, at least one each; a stream's slots are spread evenly over the pattern.
    """
    exact = np.asarray(shares) * PATTERN_SLOTS
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    while counts.sum() < PATTERN_SLOTS:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > PATTERN_SLOTS:
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    streams = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ranks + 0.5) / counts[streams], kind="stable")
    return streams[order], ranks[order], counts
