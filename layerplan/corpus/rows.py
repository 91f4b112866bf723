"""Packed rows: fixed-length token rows that hold whole documents or pieces of them, and never mix their attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

PADDING = -1
"""Document id of padding positions."""


@dataclass(frozen=True)
class PackedRows:
    """n rows of T tokens.

    `row_ids` (n,) int64 are unique in a store; `input_ids` (n, T) int32; `document_ids` (n, T) int32 count documents
    within the row, -1 is padding; `position_ids` (n, T) int32 restart at every document. `start_layers` (n,) int32 is the
    decoder layer each row trains from where rows are prompts with a label, whose last token alone is learned; a row that
    only fills up a rank's share has the id -1 and is all padding.
    """

    row_ids: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    document_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    start_layers: NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.row_ids)

    def take(self, start: int, stop: int) -> PackedRows:
        """Rows [start, stop)."""
        return self.select(slice(start, stop))

    def select(self, chosen: slice | NDArray[np.int64]) -> PackedRows:
        """The rows a slice or an array of indices names."""
        return PackedRows(
            self.row_ids[chosen],
            self.input_ids[chosen],
            self.document_ids[chosen],
            self.position_ids[chosen],
            None if self.start_layers is None else self.start_layers[chosen],
        )

    def split(self, size: int) -> Iterator[PackedRows]:
        """Pieces of at most `size` rows, in order."""
        for start in range(0, len(self), size):
            yield self.take(start, start + size)


def join_documents(rows: PackedRows) -> PackedRows:
    """The rows with everything that is not padding as one document each."""
    columns = np.arange(rows.input_ids.shape[1], dtype=np.int32)
    return replace(
        rows,
        document_ids=np.where(rows.document_ids == PADDING, PADDING, 0).astype(np.int32),
        position_ids=np.broadcast_to(columns, rows.input_ids.shape),
    )


def make_rows(
    row_ids: NDArray[np.int64], input_ids: NDArray[np.int32], starts: list[NDArray[np.int32]], used: NDArray[np.int32]
) -> PackedRows:
    """Rebuilds document and position ids from the document starts a store keeps.

    Args:
        row_ids: (n,).
        input_ids: (n, T).
        starts: Per row, the sorted positions at which a document (or a piece carried over from the row before) begins;
            the first is 0.
        used: (n,) tokens that are not padding.
    """
    num_rows, seq_len = input_ids.shape
    marks = np.zeros((num_rows, seq_len), dtype=np.int32)
    for row, positions in enumerate(starts):
        marks[row, positions] = 1
    document_ids = np.cumsum(marks, axis=1, dtype=np.int32) - 1
    columns = np.arange(seq_len, dtype=np.int32)
    last_start = np.maximum.accumulate(np.where(marks == 1, columns, 0), axis=1).astype(np.int32)
    position_ids = columns[None, :] - last_start
    padding = columns[None, :] >= used[:, None]
    document_ids[padding] = PADDING
    position_ids[padding] = 0
    return PackedRows(row_ids, input_ids, document_ids, position_ids)
