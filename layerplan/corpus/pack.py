"""Documents of any length to rows of one length, nothing truncated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerplan.errors import CorpusError


@dataclass(frozen=True)
class RawRow:
    """One packed row: (seq_len,) ids, the positions at which documents start, and the tokens used."""

    input_ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    used: int


class Packer:
    """Joins documents, each begun and (unless `mark_ends` is off) ended with its tokens, and cuts the stream every `seq_len`.

    A document that crosses a cut continues in the next row as a piece of its own: attention never reaches back over
    the cut anyway. Only the last row of a corpus has padding.
    """

    def __init__(
        self, seq_len: int, end_of_text_id: int, begin_ids: Sequence[int] = (), *, mark_ends: bool = True
    ) -> None:
        self._seq_len = seq_len
        self._end_of_text_id = end_of_text_id
        self._begin = np.array(begin_ids, dtype=np.int32)
        self._end = np.array([end_of_text_id] if mark_ends else [], dtype=np.int32)
        self._row = np.full(seq_len, end_of_text_id, dtype=np.int32)
        self._starts: list[int] = []
        self._used = 0

    def add(self, ids: NDArray[np.int32]) -> list[RawRow]:
        """Adds a document; returns the rows it completed."""
        rows: list[RawRow] = []
        document = np.concatenate([self._begin, ids, self._end])
        position = 0
        while position < len(document):
            size = min(self._seq_len - self._used, len(document) - position)
            self._starts.append(self._used)
            self._row[self._used : self._used + size] = document[position : position + size]
            self._used += size
            position += size
            if self._used == self._seq_len:
                rows.append(self._emit())
        return rows

    @property
    def open_row(self) -> RawRow | None:
        """The row being filled, if any: what a build must keep to go on."""
        if not self._used:
            return None
        return RawRow(self._row.copy(), np.asarray(self._starts, dtype=np.int32), self._used)

    def reopen(self, row: RawRow) -> None:
        """Goes on filling a row that `open_row` returned."""
        self._row, self._starts, self._used = row.input_ids.copy(), row.starts.tolist(), row.used

    def finish(self) -> RawRow | None:
        """Returns the last, padded row, if one is open."""
        return self._emit() if self._used else None

    def _emit(self) -> RawRow:
        row = RawRow(self._row, np.asarray(self._starts, dtype=np.int32), self._used)
        self._row = np.full(self._seq_len, self._end_of_text_id, dtype=np.int32)
        self._starts, self._used = [], 0
        return row


def check_ids(ids: NDArray[np.int32], num_ids: int | None, document: str) -> None:
    """Refuses a document with an id that no text was thought to yield: the model may have no embedding for it.

    Raises:
        CorpusError: Naming the document and the id.
    """
    if num_ids is not None and len(ids) and ids.max() >= num_ids:
        raise CorpusError(
            f"document {document}: its text yields token {ids.max()}, and ids below {num_ids} are expected of this"
            " tokenizer; leave the document out, or take the entry out of tokenizer.json"
        )
