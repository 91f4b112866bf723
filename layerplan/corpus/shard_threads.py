"""Shards written by threads and handed back in the order they were given.

Compressing and hashing leave Python's lock alone, so threads of one process write side by side while it packs the next
rows. How many there are changes no byte: a shard's name, rows and first row are settled before a thread takes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from layerplan.corpus.manifest import Shard
from layerplan.corpus.pack import RawRow
from layerplan.corpus.store import write_rows


class ShardThreads:
    """Threads that write shards; at most one shard more than there are threads is held in memory."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="shard")
        self._open: deque[Future[Shard]] = deque()

    def submit(self, path: Path, rows: list[RawRow], *, first_row_id: int, rows_per_group: int) -> None:
        """Gives a shard to the threads; waits for the oldest one while there are too many."""
        self._open.append(
            self._pool.submit(write_rows, path, rows, first_row_id=first_row_id, rows_per_group=rows_per_group)
        )
        if len(self._open) > self._num_threads:
            wait([self._open[-1 - self._num_threads]])

    def take(self, *, everything: bool = False) -> Iterator[Shard]:
        """Yields those that are on disk with all before them; `everything` waits for the rest.

        Raises:
            OSError: When the disk is full or refuses; `pyarrow.ArrowException` likewise.
        """
        while self._open and (everything or self._open[0].done()):
            shard = self._open[0].result()  # one that failed stays first, so that none after it is taken for it
            self._open.popleft()
            yield shard

    def close(self) -> None:
        """Waits for the shards that are being written and gives up the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)
