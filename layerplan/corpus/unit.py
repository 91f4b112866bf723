"""Pieces of raw text, as they are listed and as they are read: one of them, and all of a corpus as columns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import NDArray

from layerplan.corpus.file_table import BATCH, FileTable

READERS = ("jsonl", "parquet", "arrow", "text", "machine")
"""Names of the readers; a column of formats holds their places here."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One stretch of one file, or one module, to read.

    Attributes:
        source: Index of the source in the config.
        path: File or module.
        format: Name of the reader.
        start: First byte of the stretch.
        stop: One past its last byte.
        skip: Documents (malformed ones too) at its beginning that were read before.
    """

    source: int
    path: str
    format: str
    start: int
    stop: int
    skip: int = 0

    @property
    def num_bytes(self) -> int:
        """Length of the stretch."""
        return self.stop - self.start

    def list_fields(self) -> list[int | str]:
        """The values in the order of the fields."""
        return [self.source, self.path, self.format, self.start, self.stop, self.skip]


@dataclass(frozen=True, slots=True)
class SourceUnits:
    """The units of one source.

    Attributes:
        source: Index of the source in the config.
        files: The source's files.
        places: (n,), place in `files` of each unit's file.
        formats: (n,), place in `READERS` of each unit's reader.
        starts: (n,), first byte.
        stops: (n,), one past the last byte.
    """

    source: int
    files: FileTable
    places: NDArray[np.int64]
    formats: NDArray[np.int8]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Unit]:
        for start in range(0, len(self), BATCH):
            part = self.cut(start, start + BATCH)
            names = part.files.names.take(part.places).to_pylist()
            columns = zip(names, part.formats.tolist(), part.starts.tolist(), part.stops.tolist(), strict=True)
            for name, code, first, stop in columns:
                yield Unit(self.source, self.files.make_path(name), READERS[code], first, stop)

    def cut(self, start: int, stop: int) -> SourceUnits:
        """The units from one to before another."""
        part = slice(start, stop)
        places, formats = self.places[part], self.formats[part]
        return SourceUnits(self.source, self.files, places, formats, self.starts[part], self.stops[part])


class UnitTable(Sequence[Unit]):
    """Units in order, as columns, with the numbers that they have in the whole corpus.

    Attributes:
        first: Number of the first one.
        skip: Documents of the first one that were read before.
    """

    def __init__(self, parts: Sequence[SourceUnits], *, first: int = 0, skip: int = 0) -> None:
        self.first = first
        self.skip = skip
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))

    @property
    def num_bytes(self) -> int:
        """Length of all stretches together."""
        return sum(int((part.stops - part.starts).sum()) for part in self._parts)

    def sum_bytes(self) -> NDArray[np.int64]:
        """(n + 1,): bytes of all units before each, and of all."""
        sizes = [part.stops - part.starts for part in self._parts]
        return np.concatenate([np.zeros(1, np.int64), *sizes]).cumsum()

    def split_by_source(self) -> Iterator[tuple[int, UnitTable]]:
        """Each source that has units, with them."""
        for part, end in zip(self._parts, self._ends, strict=True):
            yield part.source, UnitTable([part], first=self.first + end - len(part))

    def resume(self, number: int, skip: int) -> UnitTable:
        """What is left from the unit of a number on, without the documents of it that were read before."""
        rest = self[max(number - self.first, 0) :]
        return UnitTable(rest._parts, first=rest.first, skip=skip)

    def number(self) -> Iterator[tuple[int, Unit]]:
        """Each unit with its number."""
        return enumerate(self, start=self.first)

    def count_files(self) -> int:
        """How many files the units are of."""
        return sum(len(np.unique(part.places)) for part in self._parts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Unit: ...
    @overload
    def __getitem__(self, index: slice) -> UnitTable: ...
    def __getitem__(self, index: int | slice) -> Unit | UnitTable:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"units are cut one after another, got a step of {step}")
            starts = [end - len(part) for part, end in zip(self._parts, self._ends, strict=True)]
            parts = [
                part.cut(max(start - before, 0), max(stop - before, 0))
                for part, before in zip(self._parts, starts, strict=True)
            ]
            return UnitTable(parts, first=self.first + start, skip=self.skip if start == 0 else 0)
        place = range(len(self))[index]
        part = bisect_right(self._ends, place)
        inner = place - (self._ends[part] - len(self._parts[part]))
        unit = next(iter(self._parts[part].cut(inner, inner + 1)))
        return replace(unit, skip=self.skip) if place == 0 else unit

    def __iter__(self) -> Iterator[Unit]:
        skip = self.skip
        for part in self._parts:
            for unit in part:
                yield replace(unit, skip=skip) if skip else unit
                skip = 0
