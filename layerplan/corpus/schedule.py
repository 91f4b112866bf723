"""The order of training as a pure function: (row counts, number of lanes, seed, step) -> row ids.

Every epoch has its own seeded permutation of the row groups. The permuted rows form one long sequence, cut into
`num_lanes` equal stretches; lane j reads its stretch from the front, one row per step. World size does not occur
here: rank r of W reads the lanes j with j mod W = r, so any W that divides the lanes trains on the same batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from layerplan.errors import CorpusError


@dataclass(frozen=True)
class LaneSchedule:
    """The schedule of one run.

    Attributes:
        num_rows: Training rows of the store; ids 0..num_rows-1.
        rows_per_group: Rows in each row group but the last.
        num_lanes: Sequences in a global batch.
        seed: Seed of the permutations.
    """

    num_rows: int
    rows_per_group: int
    num_lanes: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < self.num_lanes:
            raise CorpusError(
                f"token store: {self.num_rows} rows cannot fill train.global_batch_size={self.num_lanes} lanes;"
                " give more text, a shorter corpus.seq_len or a smaller batch"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch."""
        return self.num_rows // self.num_lanes

    @property
    def rows_left_out_per_epoch(self) -> int:
        """Rows an epoch does not reach, because they do not fill a global batch; other ones in each epoch."""
        return self.num_rows % self.num_lanes

    def rows_at(self, step: int) -> NDArray[np.int64]:
        """Row ids of the global batch at `step` (0-based): (num_lanes,), in lane order."""
        epoch, local = divmod(step, self.steps_per_epoch)
        positions = np.arange(self.num_lanes, dtype=np.int64) * self.steps_per_epoch + local
        return self._rows_at_positions(epoch, positions)

    def rank_rows_at(self, step: int, rank: int, world_size: int) -> NDArray[np.int64]:
        """The part of `rows_at(step)` that `rank` trains on: lanes j with j mod world_size = rank."""
        if self.num_lanes % world_size:
            raise CorpusError(f"world size {world_size} must divide train.global_batch_size={self.num_lanes}")
        return self.rows_at(step)[rank::world_size]

    def _rows_at_positions(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        order, starts = _permuted_groups(self.num_rows, self.rows_per_group, self.seed, epoch)
        slot = np.searchsorted(starts, positions, side="right") - 1
        return order[slot] * self.rows_per_group + (positions - starts[slot])


@lru_cache(maxsize=4)
def _permuted_groups(
    num_rows: int, rows_per_group: int, seed: int, epoch: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group numbers in the epoch's order, and the position of each one's first row in the epoch."""
    num_groups = -(-num_rows // rows_per_group)
    order = np.random.default_rng([seed, epoch]).permutation(num_groups).astype(np.int64)
    sizes = np.full(num_groups, rows_per_group, dtype=np.int64)
    sizes[order == num_groups - 1] = num_rows - (num_groups - 1) * rows_per_group
    return order, np.cumsum(sizes) - sizes
