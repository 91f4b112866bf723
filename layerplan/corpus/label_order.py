"""The order in which prompts with a label are trained on, as a pure function: (start layers, batch size, seed, step) -> rows.

An epoch reads every row once, in the order of Algorithm 4 of SALF: rows that start at shallow layers first, those of one
start layer in an order drawn by (seed, epoch); or all rows in that drawn order. Its last step has what is left. World size
does not occur: of each start layer's rows in a step, rank r of W takes every W-th from the r-th on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from layerplan.corpus.rows import PADDING, PackedRows

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class LabelOrder:
    """The order of one run: start layer of each row by its id, rows per step, the seed of the draws, the sorting."""

    start_layers: tuple[int, ...]
    batch_size: int
    seed: int
    is_shallow_first: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that read every row once."""
        return -(-len(self.start_layers) // self.batch_size)

    def rows_at(self, step: int) -> Ids:
        """Row ids of the global batch at a 0-based step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.order_of(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def order_of(self, epoch: int) -> Ids:
        """All row ids in an epoch's order."""
        return _order(self.start_layers if self.is_shallow_first else (0,) * len(self.start_layers), self.seed, epoch)

    def rank_rows_at(self, step: int, rank: int, world_size: int) -> Ids:
        """A rank's share of `rows_at`, -1 where it has a row less: every rank has as many of each start layer.

        Ranks run the same layers at the same time, and one without a row of its own runs padding.
        """
        rows = self.rows_at(step)
        starts = self._starts[rows]
        shares = []
        for start in np.unique(starts):
            same = rows[starts == start]
            same = np.concatenate([same, np.full(-len(same) % world_size, -1 - start, dtype=np.int64)])
            shares.append(same[rank::world_size])
        return np.concatenate(shares)

    @cached_property
    def _starts(self) -> NDArray[np.int32]:
        return np.asarray(self.start_layers, dtype=np.int32)

    def fill(self, share: Ids, rows: PackedRows) -> PackedRows:
        """A rank's rows of a step, by its share and the rows that `share` names, the first for every missing one."""
        is_real = share >= 0
        starts = np.where(is_real, self._starts[np.maximum(share, 0)], -1 - share).astype(np.int32)
        document_ids = np.where(is_real[:, None], rows.document_ids, PADDING).astype(np.int32)
        return replace(rows, row_ids=np.maximum(share, -1), document_ids=document_ids, start_layers=starts)


@lru_cache(maxsize=4)
def _order(start_layers: Sequence[int], seed: int, epoch: int) -> Ids:
    drawn = np.random.default_rng((seed, epoch)).permutation(len(start_layers))
    return drawn[np.argsort(np.asarray(start_layers)[drawn], kind="stable")].astype(np.int64)
