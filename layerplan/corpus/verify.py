"""A whole store read and compared with its manifest: every file's hash and every row group's, several files at once."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from layerplan.artifacts import hash_bytes
from layerplan.corpus.damage import describe_group
from layerplan.corpus.location import open_file
from layerplan.corpus.manifest import Manifest, Shard
from layerplan.corpus.row_groups import READ_FAULTS, count_groups, read_group
from layerplan.errors import first_line
from layerplan.progress_line import ProgressLine
from layerplan.storage.address import hide_keys, join_location

logger = logging.getLogger(__name__)

MAX_THREADS = 8
"""Each holds one file in memory."""


def verify_store(store: Path | str, manifest: Manifest, report: Callable[[str], None] = logger.info) -> list[str]:
    """Reads every file and returns one line for each damaged row group or file, in row order.

    Args:
        store: Folder or address.
        manifest: The store's, which says what was written.
        report: Receives progress lines.
    """
    started = time.monotonic()
    damage: dict[str, list[str]] = {}
    files = manifest.files

    def describe() -> str:
        found, seconds = sum(map(len, damage.values())), time.monotonic() - started
        return f"{len(damage):,} of {len(files):,} files in {seconds:.0f} s, {found:,} faults"

    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool, closing(ProgressLine(report)) as line:
        futures = {pool.submit(_verify_file, store, manifest, shard): shard.name for shard in files}
        for future in as_completed(futures):
            damage[futures[future]] = future.result()
            line.show(describe)
    report(describe())
    return [line for shard in files for line in damage[shard.name]]


def _verify_file(store: Path | str, manifest: Manifest, shard: Shard) -> list[str]:
    path = join_location(store, shard.name)
    try:
        with open_file(path) as handle:
            content = handle.read_buffer()
    except FileNotFoundError:
        return [f"{hide_keys(path)}: is missing"]
    except READ_FAULTS as error:
        return [f"{hide_keys(path)}: cannot be read ({first_line(error)})"]
    faults = list(_iter_faults(manifest, shard, content))
    if not faults and shard.sha256 and hash_bytes(content) != shard.sha256:
        known = "no row that training uses differs" if shard.groups_xxh3_128 else "which rows differ cannot be told"
        faults = [f"is not the file that was written (by its sha256); {known}"]
    return [f"{hide_keys(path)}: {fault}" for fault in faults]


def _iter_faults(manifest: Manifest, shard: Shard, content: pa.Buffer) -> Iterator[str]:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
    except READ_FAULTS as error:
        yield f"its footer cannot be read ({first_line(error)})"
        return
    for group in range(count_groups(shard.num_rows, manifest.rows_per_group)):
        try:
            read_group(
                file,
                group,
                num_rows=manifest.count_group_rows(shard, group),
                seq_len=manifest.seq_len,
                noted=shard.get_group_hash(group),
            )
        except READ_FAULTS as error:
            yield describe_group(manifest, shard, group, error)
