"""Whether the files of a store are those of its manifest, looked at when a run starts: sizes first, then their ends.

Rows are not read here. Each row group is compared with its hash when training reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from layerplan.corpus.damage import VERIFY, explain_file
from layerplan.corpus.location import open_file
from layerplan.corpus.manifest import Manifest, Shard
from layerplan.corpus.row_groups import READ_FAULTS, count_groups, hash_tail
from layerplan.errors import CorpusError, first_line
from layerplan.storage.address import hide_keys, join_location, open_filesystem

logger = logging.getLogger(__name__)

NUM_THREADS = 32
"""Files looked at at once: at an address each is a wait."""


def check_files(store: Path | str, manifest: Manifest, report: Callable[[str], None] = logger.info) -> None:
    """Compares every file with the manifest, by size and end, or by size, rows and row groups where no end was hashed.

    Warns where rows have no hashes.

    Raises:
        CorpusError: Naming the first file that is missing, cut, or another.
    """
    sizes = list_sizes(store)
    for shard in manifest.files:
        _check_size(store, shard, sizes.get(shard.name))
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="start-check") as pool:
        list(pool.map(lambda shard: _check_end(store, manifest, shard), manifest.files))
    if not manifest.is_hashed:
        report(
            f"{hide_keys(store)}: is of an earlier version, whose manifest has no hashes of row groups; damage may go"
            f" unseen in training, `{VERIFY} {hide_keys(store)}` looks for it"
        )


def list_sizes(store: Path | str) -> dict[str, int]:
    """Names and sizes of a store's files, by one listing however many there are.

    Raises:
        CorpusError: When the store cannot be listed.
    """
    try:
        filesystem, inner = open_filesystem(store)
        infos = filesystem.get_file_info(pafs.FileSelector(inner))
    except READ_FAULTS as error:
        raise CorpusError(f"{hide_keys(store)}: cannot be listed ({first_line(error)})") from None
    return {info.base_name: info.size or 0 for info in infos if info.type == pafs.FileType.File}


def _check_size(store: Path | str, shard: Shard, num_bytes: int | None) -> None:
    if num_bytes is None:
        raise explain_file(store, shard.name, "is missing")
    if shard.num_bytes not in (None, num_bytes):
        raise explain_file(store, shard.name, f"has {num_bytes:,} bytes, {shard.num_bytes:,} were written")


def _check_end(store: Path | str, manifest: Manifest, shard: Shard) -> None:
    """By the hash of the file's end: parsing 10,000 footers takes three times as long as hashing them (`docs/log.md`)."""
    if shard.num_bytes is None or not shard.tail_xxh3_128:
        _check_footer(store, manifest, shard)
        return
    try:
        with open_file(join_location(store, shard.name)) as file:
            found = hash_tail(file, shard.num_bytes)
    except READ_FAULTS as error:
        raise explain_file(store, shard.name, f"cannot be read ({first_line(error)})") from None
    if found != shard.tail_xxh3_128:
        owner = next((f", it is that of {other.name}" for other in manifest.files if other.tail_xxh3_128 == found), "")
        raise explain_file(store, shard.name, f"its end is not the one that was written{owner}")


def _check_footer(store: Path | str, manifest: Manifest, shard: Shard) -> None:
    try:
        filesystem, inner = open_filesystem(join_location(store, shard.name))
        footer = pq.read_metadata(inner, filesystem=filesystem)
    except READ_FAULTS as error:
        raise explain_file(store, shard.name, f"its footer cannot be read ({first_line(error)})") from None
    found = footer.num_rows, footer.num_row_groups
    noted = shard.num_rows, count_groups(shard.num_rows, manifest.rows_per_group)
    if found != noted:
        raise explain_file(
            store,
            shard.name,
            f"has {found[0]:,} rows in {found[1]:,} row groups, the manifest says {noted[0]:,} in {noted[1]:,}",
        )
