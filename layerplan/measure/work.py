"""What there is to measure, piece by piece: each piece is done by one process and written down once it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from layerplan.config.measure import MeasureConfig, Measurement
from layerplan.measure.spectrum import Matrix

Result = TypeVar("Result")
FOLDS = (0, 1)
"""Halves of the rows that the tuned lens is asked on, one after the other."""


@dataclass(frozen=True)
class Piece:
    """One piece of work."""

    measurement: Measurement
    number: int
    """Among the pieces of its measurement."""
    rows: tuple[int, ...] = ()
    """Rows of the text it reads."""
    matrix: Matrix | None = None
    """What `spectrum` reads in their place."""

    @property
    def key(self) -> str:
        """Name of the piece, one of its own in a measurement of one model and text."""
        return f"{self.measurement}/{self.number}"

    @property
    def fields(self) -> dict[str, Any]:
        """As a row that Ray Data carries."""
        row: dict[str, Any] = {"key": self.key, "measurement": self.measurement, "number": self.number}
        if self.matrix is not None:
            return row | {"matrix": vars(self.matrix) | {"shape": list(self.matrix.shape)}}
        return row | {"rows": list(self.rows)}


def list_pieces(
    wanted: Sequence[Measurement], config: MeasureConfig, matrices: Sequence[Matrix], pilot_rows: Sequence[int]
) -> list[Piece]:
    """The pieces of the wanted measurements, the longest first so that none is waited for at the end.

    Args:
        wanted: Names of measurements.
        config: Decides the number of rows.
        matrices: What `spectrum` reads.
        pilot_rows: Rows of the text that `pilot` trains on, in order.
    """
    every = tuple(range(config.num_rows))
    pieces: list[Piece] = []
    if "pilot" in wanted:
        pieces.append(Piece("pilot", 0, tuple(pilot_rows)))
    if "tuned_lens_gain" in wanted:
        pieces += [Piece("tuned_lens_gain", fold, every) for fold in FOLDS]
    by_row: tuple[Measurement, ...] = ("fisher", "gradient_norm", "block_influence")
    for name in by_row:
        if name in wanted:
            pieces += [Piece(name, row, (row,)) for row in every]
    if "spectrum" in wanted:
        pieces += [Piece("spectrum", number, matrix=matrix) for number, matrix in enumerate(matrices)]
    return pieces


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What the work gives, and the seconds it took."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began
