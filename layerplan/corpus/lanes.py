"""The rows of one training worker, taken from chunks of raw text lane by lane; `on_the_fly.py` has the order and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerplan.corpus.chunks import ChunkRows, Chunks, open_chunks
from layerplan.corpus.outcome import QUARANTINED
from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.corpus.schedule import check_world
from layerplan.corpus.stream import READER_CPUS
from layerplan.errors import CorpusError

ROW_BITS = 32
"""A row id is (position of its chunk << ROW_BITS) + its number within the chunk."""
JUDGED_DOCUMENTS = 1000
"""Documents after which a rank's share of malformed input is held against its limit."""


class LaneStream:
    """The rows of one rank's lanes, step by step.

    Uses Ray tasks, one chunk per lane ahead, when Ray is initialised in this process; else reads in this process.

    Args:
        store: Folder `write_stream` wrote.
        num_lanes: Sequences in a global batch.
        rank: This worker; it has the lanes j with j mod world_size = rank.
        world_size: Number of workers.
        cursor: Next row id of every lane, from a checkpoint; empty at the beginning.
        reader_cpus: What a task that reads a chunk reserves on Ray.

    Raises:
        CorpusError: When there are fewer chunks than lanes, or the lanes do not fit the workers or the cursor.
    """

    def __init__(
        self,
        store: Path | str,
        *,
        num_lanes: int,
        rank: int,
        world_size: int,
        cursor: Sequence[int] = (),
        reader_cpus: float = READER_CPUS,
    ) -> None:
        self._store, self._reader_cpus = str(store), reader_cpus
        self._chunks = open_chunks(self._store)
        check_lanes(self._chunks, num_lanes)
        check_world(num_lanes, world_size)
        if cursor and len(cursor) != num_lanes:
            raise CorpusError(f"checkpoint: has {len(cursor)} lanes, train.global_batch_size={num_lanes}")
        self._num_lanes = num_lanes
        self._next = {
            lane: (cursor[lane] if cursor else lane << ROW_BITS) for lane in range(rank, num_lanes, world_size)
        }
        self._open: dict[int, ChunkRows] = {}
        self._ahead: dict[int, tuple[int, Any]] = {}
        self.counts: Counter[str] = Counter()
        self._first_fault = ""

    @property
    def cursor(self) -> dict[int, int]:
        """Per lane of this rank the id of the row it takes next."""
        return dict(self._next)

    def take(self) -> PackedRows:
        """The next row of each lane of this rank, in lane order.

        Raises:
            CorpusError: When too much is malformed, or nothing of the corpus is kept.
        """
        ids, inputs, starts, used = [], [], [], []
        for lane in self._next:
            chunk, row = self._find_row(lane)
            stops = np.cumsum(chunk.starts_per_row[: row + 1])
            ids.append(self._next[lane])
            inputs.append(chunk.input_ids[row])
            starts.append(chunk.starts[int(stops[-1]) - int(chunk.starts_per_row[row]) : int(stops[-1])])
            used.append(chunk.used[row])
            self._next[lane] += 1
        return make_rows(np.array(ids, dtype=np.int64), np.stack(inputs), starts, np.array(used, dtype=np.int32))

    def _find_row(self, lane: int) -> tuple[ChunkRows, int]:
        """The chunk a lane's next row is in, and the row's number there; moves over the end of chunks."""
        for _ in range(len(self._chunks) + 1):
            position, row = self._next[lane] >> ROW_BITS, self._next[lane] & (2**ROW_BITS - 1)
            if lane not in self._open:
                self._open[lane] = self._read(lane, position)
            if row < len(self._open[lane]):
                return self._open[lane], row
            del self._open[lane]
            self._next[lane] = (position + self._num_lanes) << ROW_BITS
        raise CorpusError("corpus.sources: no document of the whole corpus is kept")

    def _read(self, lane: int, position: int) -> ChunkRows:
        import ray

        if ray.is_initialized():
            known, reference = self._ahead.pop(lane, (None, None))
            if known != position:
                reference = self._start_task(position)
            self._ahead[lane] = (position + self._num_lanes, self._start_task(position + self._num_lanes))
            chunk: ChunkRows = ray.get(reference)
        else:
            chunk = self._chunks.read(position)
        self.counts.update(chunk.counts)
        self._first_fault = self._first_fault or chunk.first_fault
        bad, seen, limit = self.counts[QUARANTINED], self.counts["in"], self._chunks.config.max_bad_fraction
        if seen >= JUDGED_DOCUMENTS and bad > limit * seen:
            raise CorpusError(
                f"corpus.max_bad_fraction={limit}: {bad} of the first {seen} inputs are malformed;"
                f" the first is {self._first_fault}"
            )
        return chunk

    def _start_task(self, position: int) -> Any:
        import ray

        # the default strategy, else the task would wait for room in the training workers' own placement group
        options = {"num_cpus": self._reader_cpus, "scheduling_strategy": "DEFAULT", "max_retries": 5}
        return ray.remote(_read_chunk).options(**options).remote(self._store, position)


def check_lanes(chunks: Chunks, num_lanes: int) -> None:
    """Raises `CorpusError` when there are not enough chunks for every lane to have one of its own."""
    if len(chunks) < num_lanes:
        raise CorpusError(
            f"corpus.mode=on_the_fly: {len(chunks)} chunks of text cannot feed train.global_batch_size={num_lanes} lanes;"
            " give more text, a smaller batch, or use mode=store"
        )


def _read_chunk(store: str, position: int) -> ChunkRows:
    return open_chunks(store).read(position)
