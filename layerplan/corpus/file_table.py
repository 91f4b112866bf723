"""Files of a corpus as columns, so that a hundred million of them fit into a driver: a name and eight bytes each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from layerplan.errors import CorpusError

BATCH = 65_536
"""Files that are Python objects at a time."""
NAMES_TOLD = 5


@dataclass
class LeftOut:
    """Files that are not read for one reason: how many, and what the first of them are called."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Counts one more; names come in any order."""
        self.count += 1
        self.names = sorted([*self.names, name])[:NAMES_TOLD]

    def __str__(self) -> str:
        more = f" and {self.count - NAMES_TOLD} more" if self.count > NAMES_TOLD else ""
        return ", ".join(self.names) + more


class FileTable:
    """Files in an order, each with its address and size.

    Attributes:
        names: What differs between their addresses.
        sizes: (n,), bytes.
        before: What stands before every name: scheme, host and folder.
        after: What stands after it: the options of an address.
        left_out: What a listing found beside them and does not read, by the reason.
    """

    def __init__(self, names: pa.LargeStringArray, sizes: NDArray[np.int64], before: str = "", after: str = "") -> None:
        self.names = names
        self.sizes = sizes
        self.before = before
        self.after = after
        self.left_out: dict[str, LeftOut] = {}

    @classmethod
    def collect(cls, files: Iterable[tuple[str, int]], before: str = "", after: str = "") -> FileTable:
        """Takes names and sizes, some at a time.

        Raises:
            CorpusError: When a name is not valid Unicode.
        """
        names: list[pa.Array] = [pa.array([], type=pa.large_string())]
        sizes: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        rest = iter(files)
        while batch := list(islice(rest, BATCH)):
            names.append(_make_names([name for name, _ in batch], before))
            sizes.append(np.array([size for _, size in batch], dtype=np.int64))
        return cls(pa.concat_arrays(names), np.concatenate(sizes), before, after)

    def sort(self) -> FileTable:
        """The files in the order of their names' characters."""
        order = pc.sort_indices(self.names)
        return FileTable(self.names.take(order), self.sizes[order.to_numpy()], self.before, self.after)

    def iter_names(self) -> Iterator[str]:
        """The names, in order."""
        for start in range(0, len(self), BATCH):
            yield from self.names.slice(start, BATCH).to_pylist()

    def iter_paths(self) -> Iterator[str]:
        """The addresses, in order."""
        return map(self.make_path, self.iter_names())

    def make_path(self, name: str) -> str:
        """The address of the file of a name."""
        return f"{self.before}{name}{self.after}"

    def name_at(self, index: int) -> str:
        """The name of one file."""
        name: str = self.names[index].as_py()
        return name

    def __len__(self) -> int:
        return len(self.sizes)


def _make_names(names: list[str], before: str) -> pa.Array:
    try:
        return pa.array(names, type=pa.large_string())
    except UnicodeEncodeError as error:
        raise CorpusError(f"{before}{error.object!a}: the file's name is not valid UTF-8; rename it") from None
