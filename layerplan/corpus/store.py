"""The token store on disk: Parquet shards of fixed-size row groups, written aside and moved into place."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from layerplan.corpus.manifest import VALIDATION_NAME, Manifest, Shard
from layerplan.corpus.pack import RawRow
from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.errors import CorpusError


def write_rows(path: Path, rows: list[RawRow], *, first_row_id: int, rows_per_group: int) -> Shard:
    """Writes one shard atomically and returns its manifest entry."""
    seq_len = len(rows[0].input_ids)
    flat = pa.array(np.concatenate([row.input_ids for row in rows]))
    table = pa.table(
        {
            "row_id": pa.array(np.arange(first_row_id, first_row_id + len(rows), dtype=np.int64)),
            "input_ids": pa.FixedSizeListArray.from_arrays(flat, seq_len),
            "starts": pa.array([row.starts for row in rows], type=pa.list_(pa.int32())),
            "used": pa.array([row.used for row in rows], type=pa.int32()),
        }
    )
    partial = path.with_name(path.name + ".partial")
    pq.write_table(table, partial, row_group_size=rows_per_group, compression="zstd")
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    partial.replace(path)
    return Shard(name=path.name, num_rows=len(rows), sha256=digest)


class StoreReader:
    """Reads row groups by number; the group's number fixes its shard, since all shards but the last are full."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self.manifest = Manifest.load(store)
        self._groups_per_shard = -(-self.manifest.shards[0].num_rows // self.manifest.rows_per_group)

    def read_group(self, group: int) -> PackedRows:
        """Rows of one row group, in order.

        Raises:
            CorpusError: When the shard is missing or damaged.
        """
        shard, local = divmod(group, self._groups_per_shard)
        path = self._store / self.manifest.shards[shard].name
        try:
            table = _open_shard(str(path)).read_row_group(local)
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
        return _to_rows(table, self.manifest.seq_len)

    def read_rows(self, row_ids: NDArray[np.int64]) -> PackedRows:
        """Rows by id, in the order asked for."""
        pieces = []
        for row_id in row_ids:
            group, local = divmod(int(row_id), self.manifest.rows_per_group)
            pieces.append(_read_cached(self, group).take(local, local + 1))
        return concatenate(pieces)


def concatenate(pieces: list[PackedRows]) -> PackedRows:
    """Joins rows of several pieces."""
    return PackedRows(
        np.concatenate([piece.row_ids for piece in pieces]),
        np.concatenate([piece.input_ids for piece in pieces]),
        np.concatenate([piece.document_ids for piece in pieces]),
        np.concatenate([piece.position_ids for piece in pieces]),
    )


def load_validation_rows(store: Path) -> PackedRows | None:
    """The held-out rows, or None when the store has none; their ids are negative, -1 downwards."""
    manifest = Manifest.load(store)
    if manifest.num_validation_rows == 0:
        return None
    return _to_rows(pq.read_table(store / VALIDATION_NAME), manifest.seq_len)


def _to_rows(table: pa.Table, seq_len: int) -> PackedRows:
    ids = table["input_ids"].combine_chunks()
    flat = (ids.chunk(0) if isinstance(ids, pa.ChunkedArray) else ids).flatten().to_numpy(zero_copy_only=False)
    starts = [np.asarray(value, dtype=np.int32) for value in table["starts"].to_pylist()]
    return make_rows(
        table["row_id"].to_numpy(),
        flat.reshape(-1, seq_len).astype(np.int32, copy=False),
        starts,
        table["used"].to_numpy().astype(np.int32),
    )


@lru_cache(maxsize=64)
def _open_shard(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(path)


@lru_cache(maxsize=256)
def _read_cached(reader: StoreReader, group: int) -> PackedRows:
    return reader.read_group(group)
