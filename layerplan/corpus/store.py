"""The token store on disk: Parquet shards of fixed-size row groups, written aside and moved into place."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from layerplan.artifacts import hash_file
from layerplan.aside import writing_aside
from layerplan.corpus.damage import explain_group
from layerplan.corpus.manifest import Manifest, Shard
from layerplan.corpus.pack import RawRow
from layerplan.corpus.row_groups import READ_FAULTS, RawRows, count_groups, hash_groups, hash_tail, read_group
from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.storage.address import join_location, open_filesystem

OPEN_FILES = 64
"""Shards whose footers a reader keeps."""


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
    with writing_aside(path) as aside:
        # a byte of every token beside the same byte of the next: a quarter smaller than zstd over a dictionary, in half the time
        pq.write_table(
            table,
            aside,
            row_group_size=rows_per_group,
            compression="zstd",
            use_dictionary=False,
            use_byte_stream_split=["input_ids.list.element"],
            write_statistics=False,
        )
        digest = hash_file(aside)
        with aside.open("rb") as handle:
            num_bytes = handle.seek(0, os.SEEK_END)
            tail = hash_tail(handle, num_bytes)
    return Shard(
        name=path.name,
        num_rows=len(rows),
        num_tokens=sum(row.used for row in rows),
        sha256=digest,
        num_bytes=num_bytes,
        tail_xxh3_128=tail,
        max_id=max(int(row.input_ids.max()) for row in rows),
        groups_xxh3_128=hash_groups(rows, rows_per_group),
    )


class StoreReader:
    """Reads rows by id; a row's id fixes its shard and row group, so nothing else is read.

    `num_ids`, the ids that the model has embeddings for, bounds those of stores whose rows have no hashes.
    """

    def __init__(self, store: Path | str, *, num_ids: int | None = None) -> None:
        self.manifest = Manifest.load(store)
        sizes = np.array([shard.num_rows for shard in self.manifest.shards], dtype=np.int64)
        self._first_rows = np.cumsum(sizes) - sizes
        self._files = StoreFiles(store, self.manifest, num_ids)

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
        return self._files.read(self.manifest.shards[shard], group)


class StoreFiles:
    """Row groups of a store's files, each compared with the manifest as it is read."""

    def __init__(self, store: Path | str, manifest: Manifest, num_ids: int | None = None) -> None:
        self._store = store
        self._num_ids = num_ids
        self._manifest = manifest
        self._open = lru_cache(maxsize=OPEN_FILES)(self._open_file)

    def read(self, shard: Shard, group: int) -> RawRows:
        """The rows of one group.

        Raises:
            CorpusError: When the file is missing, cannot be read, or holds other rows than were written.
        """
        manifest = self._manifest
        try:
            return read_group(
                self._open(shard.name),
                group,
                num_rows=manifest.count_group_rows(shard, group),
                seq_len=manifest.seq_len,
                noted=shard.get_group_hash(group),
                num_ids=self._num_ids,
            )
        except READ_FAULTS as error:
            raise explain_group(self._store, manifest, shard, group, error) from None

    def _open_file(self, name: str) -> pq.ParquetFile:
        filesystem, inner = open_filesystem(join_location(self._store, name))
        return pq.ParquetFile(inner, filesystem=filesystem)


def load_validation_rows(store: Path | str, *, num_ids: int | None = None) -> PackedRows | None:
    """The held-out rows, or None when the store has none; their ids are negative, up to -1.

    Raises:
        CorpusError: When their file is missing or damaged.
    """
    manifest = Manifest.load(store)
    shard = manifest.held_out
    if shard is None:
        return None
    files = StoreFiles(store, manifest, num_ids)
    parts = [files.read(shard, group) for group in range(count_groups(shard.num_rows, manifest.rows_per_group))]
    rows = make_rows(
        np.arange(-shard.num_rows, 0, dtype=np.int64),
        np.concatenate([part.input_ids for part in parts]),
        [starts for part in parts for starts in part.starts],
        np.concatenate([part.used for part in parts]),
    )
    return rows if manifest.labels is None else replace(rows, start_layers=np.zeros(len(rows), dtype=np.int32))
