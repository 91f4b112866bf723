"""Rows of held-out texts in one file, and losses of models on them, row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerplan.artifacts import hash_bytes, write_json
from layerplan.aside import writing_aside
from layerplan.corpus.rows import PackedRows
from layerplan.errors import CorpusError, first_line

_FIELDS = ("row_ids", "input_ids", "document_ids", "position_ids")


@dataclass(frozen=True)
class RowLosses:
    """A model on one text."""

    nats: NDArray[np.float64]
    """(R,) summed loss of every row."""
    labels: NDArray[np.int64]
    """(R,) tokens it is summed over."""
    rows_sha256: str = ""
    """Hash of the rows' token ids: losses on other rows cannot be compared."""

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / max(1, self.labels.sum()))


def hash_rows(rows: PackedRows) -> str:
    """Of their token ids and the documents in them."""
    parts = (np.ascontiguousarray(values, dtype="<i4").tobytes() for values in (rows.input_ids, rows.document_ids))
    return hash_bytes(b"".join(parts))


def save_texts(path: Path, texts: Mapping[str, PackedRows]) -> None:
    """Writes rows by the names of their texts."""
    arrays = {f"{name}/{field}": getattr(rows, field) for name, rows in texts.items() for field in _FIELDS}
    with writing_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_texts(path: Path) -> dict[str, PackedRows]:
    """Reads them; raises `CorpusError` when the file cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = dict.fromkeys(key.rpartition("/")[0] for key in arrays.files)
            return {name: PackedRows(*(arrays[f"{name}/{field}"] for field in _FIELDS)) for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise CorpusError(f"{path}: held-out rows cannot be read ({first_line(error)}); delete it") from None


def save_losses(path: Path, losses: Mapping[str, RowLosses]) -> None:
    """Writes the losses of a model by text."""
    values = {
        name: {"rows_sha256": each.rows_sha256, "nats": each.nats.tolist(), "labels": each.labels.tolist()}
        for name, each in losses.items()
    }
    write_json(path, values)


def load_losses(path: Path) -> dict[str, RowLosses]:
    """Reads them; empty when there are none.

    Raises:
        CorpusError: When the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        return {
            name: RowLosses(
                np.array(each["nats"], dtype=np.float64),
                np.array(each["labels"], dtype=np.int64),
                str(each["rows_sha256"]),
            )
            for name, each in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path}: losses cannot be read ({first_line(error)}); delete it") from None
