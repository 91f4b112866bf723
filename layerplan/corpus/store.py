"""The token store on disk: Parquet shards of fixed-size row groups, written aside and moved into place."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from layerplan.corpus.location import join_location, open_filesystem
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
    # a byte of every token beside the same byte of the next: a quarter smaller than zstd over a dictionary, in half the time
    pq.write_table(
        table,
        partial,
        row_group_size=rows_per_group,
        compression="zstd",
        use_dictionary=False,
        use_byte_stream_split=["input_ids.list.element"],
        write_statistics=False,
    )
    with partial.open("rb+") as handle:
        os.fsync(handle.fileno())
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    partial.replace(path)
    return Shard(name=path.name, num_rows=len(rows), num_tokens=sum(row.used for row in rows), sha256=digest)


@dataclass(frozen=True)
class RawRows:
    """Rows as they lie on disk: (n, T) ids, document starts per row, (n,) tokens used."""

    input_ids: NDArray[np.int32]
    starts: list[NDArray[np.int32]]
    used: NDArray[np.int32]


class StoreReader:
    """Reads rows by id; a row's id fixes its shard and row group, so nothing else is read."""

    def __init__(self, store: Path | str) -> None:
        self._store = store
        self.manifest = Manifest.load(store)
        sizes = np.array([shard.num_rows for shard in self.manifest.shards], dtype=np.int64)
        self._first_rows = np.cumsum(sizes) - sizes

    def read_rows(self, row_ids: NDArray[np.int64]) -> PackedRows:
        """Rows by id, in the order asked for; each row group they lie in is read once.

        Raises:
            CorpusError: When a shard is missing or damaged.
        """
        seq_len = self.manifest.seq_len
        input_ids = np.empty((len(row_ids), seq_len), dtype=np.int32)
        used = np.empty(len(row_ids), dtype=np.int32)
        starts: list[NDArray[np.int32]] = [np.empty(0, np.int32)] * len(row_ids)
        shards = np.searchsorted(self._first_rows, row_ids, side="right") - 1
        groups, locals_ = np.divmod(row_ids - self._first_rows[shards], self.manifest.rows_per_group)
        for shard, group in np.unique(np.stack([shards, groups], axis=1), axis=0).tolist():
            raw = self._read_group(shard, group)
            for place in np.flatnonzero((shards == shard) & (groups == group)):
                local = int(locals_[place])
                input_ids[place], used[place], starts[place] = raw.input_ids[local], raw.used[local], raw.starts[local]
        return make_rows(np.asarray(row_ids, dtype=np.int64), input_ids, starts, used)

    def _read_group(self, shard: int, group: int) -> RawRows:
        path = join_location(self._store, self.manifest.shards[shard].name)
        try:
            table = _open_shard(path).read_row_group(group, columns=["input_ids", "starts", "used"])
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
        return _to_raw(table, self.manifest.seq_len)


def load_validation_rows(store: Path | str) -> PackedRows | None:
    """The held-out rows, or None when the store has none; their ids are negative, -1 downwards."""
    manifest = Manifest.load(store)
    if manifest.num_validation_rows == 0:
        return None
    table = _open_shard(join_location(store, VALIDATION_NAME)).read()
    raw = _to_raw(table, manifest.seq_len)
    return make_rows(table["row_id"].to_numpy(), raw.input_ids, raw.starts, raw.used)


def _to_raw(table: pa.Table, seq_len: int) -> RawRows:
    ids = table["input_ids"].combine_chunks()
    flat = (ids.chunk(0) if isinstance(ids, pa.ChunkedArray) else ids).flatten().to_numpy(zero_copy_only=False)
    lists = table["starts"].combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    return RawRows(
        flat.reshape(-1, seq_len).astype(np.int32, copy=False),
        [values[start:stop] for start, stop in pairwise(offsets)],
        table["used"].to_numpy().astype(np.int32),
    )


@lru_cache(maxsize=64)
def _open_shard(path: str) -> pq.ParquetFile:
    filesystem, inner = open_filesystem(path)
    return pq.ParquetFile(inner, filesystem=filesystem)
