"""Rows made while training, for those without disk for a token store.

The input is cut into *chunks*, permuted anew for every epoch by the seed; position p of the endless row of chunks belongs
to lane p mod num_lanes, and a lane takes its chunks one after another, row by row. A checkpoint keeps the next row of
every lane, so that each chunk is read exactly once per epoch over any crash and any number of workers. How many rows a
chunk gives is not known before it was read: lanes drift apart, and which rows meet in a batch depends on the number of
lanes. There is no de-duplication across the corpus, and the last row of every chunk is padded.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.build import (
    find_complete,
    hash_config,
    hash_units,
    warn_of_held_out,
    write_manifest,
)
from layerplan.corpus.decontamination import BenchmarkText, hash_held_out
from layerplan.corpus.joining import read_joining
from layerplan.corpus.location import join_location, open_file
from layerplan.corpus.manifest import MANIFEST_NAME, Manifest, SourceRows
from layerplan.corpus.pack import Packer, RawRow
from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.corpus.sources import UNIT_BYTES, Unit, list_units
from layerplan.corpus.tokenize import FILTERED, KEPT, QUARANTINED, UnitTokenizer
from layerplan.corpus.writer import check_ids, explain_disk_faults
from layerplan.errors import CorpusError
from layerplan.plan.hashing import compute_sha256

logger = logging.getLogger(__name__)

STREAM_NAME = "stream.json"
MIN_CHUNK_BYTES = 64 * 2**10
CHUNKS_WANTED = 4096
MAX_WHOLE_BYTES = 64 * 2**20
"""Largest file that can be a chunk as a whole."""
ROW_BITS = 32
"""A row id is (position of its chunk << ROW_BITS) + its number within the chunk."""
FORMER_POLICY = "token"
"""What streams that name no `corpus.control_tokens` did with one."""
JUDGED_DOCUMENTS = 1000
"""Documents after which a rank's share of malformed input is held against its limit."""


def write_stream(
    config: CorpusConfig,
    tokenizer: Path,
    store: Path,
    *,
    questions: Sequence[BenchmarkText] = (),
    seed: int = 0,
    report: Callable[[str], None] = logger.info,
) -> Manifest:
    """Writes what training needs to make rows by itself: the chunks, the tokenizer, the filters. Reads no text.

    Raises:
        CorpusError: When a source is missing, a file is too large to be read as a whole, or the folder is taken.
        ModelError: When the tokenizer cannot be read, or nothing says which token ends a text.
    """
    joining = read_joining(config, tokenizer)
    chunks = list_chunks(config, report)
    config_sha256 = compute_sha256([hash_config(config, questions, seed), *map(hash_units, chunks)])
    content = {
        "config": config.model_dump(mode="json"),
        "tokenizer": joining.facts.json_text,
        "end_of_text_id": joining.end_of_text_id,
        "begin_ids": joining.begin_ids,
        "num_ids": joining.num_ids,
        "questions": [asdict(question) for question in questions],
        "chunks": [[list(asdict(unit).values()) for unit in chunk] for chunk in chunks],
        "seed": seed,
    }
    held_out_sha256 = hash_held_out(questions, config.decontamination)
    if (store / MANIFEST_NAME).exists():
        manifest = find_complete(store, joining, config_sha256, report)
        warn_of_held_out(manifest, store, held_out_sha256, report)
        # fields that do not change the rows may have changed; what decides them stays
        known = json.loads((store / STREAM_NAME).read_text(encoding="utf-8"))
        policy = {"control_tokens": known["config"].get("control_tokens", FORMER_POLICY)}
        kept = {"questions": known["questions"], "config": config.model_dump(mode="json") | policy}
        _write_content(store, content | kept)
        return manifest
    manifest = Manifest(
        mode="on_the_fly",
        seq_len=config.seq_len,
        rows_per_group=config.rows_per_group,
        num_rows=0,
        num_validation_rows=0,
        num_tokens=0,
        num_padding_tokens=0,
        **joining.describe(),
        config_sha256=config_sha256,
        held_out_sha256=held_out_sha256,
        counts={},
        num_questions=len(questions) if config.decontamination.enabled else 0,
        sources=[_no_rows(source.path) for source in config.sources],
        shards=[],
    )
    _write_content(store, content)
    write_manifest(store, manifest)
    for note in joining.facts.notes:
        report(note)
    report(f"{store}: {len(chunks):,} chunks of text to tokenize while training")
    return manifest


def _write_content(store: Path, content: dict[str, Any]) -> None:
    with explain_disk_faults(store):
        store.mkdir(parents=True, exist_ok=True)
        partial = store / (STREAM_NAME + ".partial")
        partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        partial.replace(store / STREAM_NAME)


def _no_rows(path: str) -> SourceRows:
    names = ("num_rows", "num_tokens", "num_padding_tokens", "num_validation_rows", "num_validation_tokens")
    return SourceRows(path=path, weight=None, counts={}, **dict.fromkeys(names, 0))


def list_chunks(config: CorpusConfig, report: Callable[[str], None] | None = None) -> list[list[Unit]]:
    """Consecutive units of the input, joined to chunks: some 4,096 of them, between 64 KiB and 8 MiB each."""
    total = sum(unit.num_bytes for unit in list_units(config))
    size = min(UNIT_BYTES, max(MIN_CHUNK_BYTES, total // CHUNKS_WANTED))
    chunks: list[list[Unit]] = []
    room = 0
    for unit in list_units(config, unit_bytes=size, report=report):
        if unit.num_bytes > MAX_WHOLE_BYTES:
            raise CorpusError(
                f"corpus.mode=on_the_fly: {unit.path} has {unit.num_bytes:,} bytes and can only be read as a whole, which is"
                f" done up to {MAX_WHOLE_BYTES:,}; use plain JSONL or Parquet, smaller files, or mode=store"
            )
        if not chunks or unit.num_bytes > room:
            chunks.append([])
            room = size
        chunks[-1].append(unit)
        room -= unit.num_bytes
    return chunks


@dataclass(frozen=True)
class ChunkRows:
    """The rows of one chunk, and what became of its documents."""

    input_ids: NDArray[np.int32]
    """(n, T)."""
    starts: NDArray[np.int32]
    """Document starts of all rows, one after another."""
    starts_per_row: NDArray[np.int32]
    """(n,)."""
    used: NDArray[np.int32]
    """(n,)."""
    counts: dict[str, int]
    first_fault: str

    def __len__(self) -> int:
        return len(self.used)


class Chunks:
    """The chunks of a stream, made to rows on demand."""

    def __init__(self, store: Path | str) -> None:
        with open_file(join_location(store, STREAM_NAME)) as handle:
            content = json.loads(bytes(handle.read()))
        self.config = CorpusConfig.model_validate({"control_tokens": FORMER_POLICY} | content["config"])
        self._end_of_text_id = int(content["end_of_text_id"])
        self._begin_ids = [int(number) for number in content.get("begin_ids", ())]
        self._num_ids = content.get("num_ids")
        self._seed = int(content["seed"])
        self._chunks = content["chunks"]
        self._tokenizer_json = content["tokenizer"]
        self._questions = [BenchmarkText(**fields) for fields in content["questions"]]
        self._tokenizer: UnitTokenizer | None = None

    def __len__(self) -> int:
        return len(self._chunks)

    def read(self, position: int) -> ChunkRows:
        """Reads, cleans, tokenizes and packs the chunk at a position of the endless row of chunks."""
        if self._tokenizer is None:
            self._tokenizer = UnitTokenizer(self.config, self._tokenizer_json, self._questions)
        epoch, place = divmod(position, len(self))
        number = int(_permute_chunks(len(self), self._seed, epoch)[place])
        packer = Packer(self.config.seq_len, self._end_of_text_id, self._begin_ids)
        rows: list[RawRow] = []
        counts: Counter[str] = Counter()
        first_fault = ""
        for fields in self._chunks[number]:
            for record in (record for batch in self._tokenizer.read(number, Unit(*fields)) for record in batch):
                name = f"{record.status}/{record.reason}" if record.status == FILTERED else record.status
                counts["in"] += record.num_documents
                counts[name] += record.num_documents
                if record.status == QUARANTINED:
                    first_fault = first_fault or f"{record.id}: {record.reason}"
                if record.status == KEPT:
                    ids = np.frombuffer(record.ids, dtype=np.int32)
                    check_ids(ids, self._num_ids, record.id)
                    rows += packer.add(ids)
        last = packer.finish()
        rows += [last] if last is not None else []
        return ChunkRows(
            np.stack([row.input_ids for row in rows]) if rows else np.empty((0, self.config.seq_len), np.int32),
            np.concatenate([row.starts for row in rows]) if rows else np.empty(0, np.int32),
            np.array([len(row.starts) for row in rows], dtype=np.int32),
            np.array([row.used for row in rows], dtype=np.int32),
            dict(counts),
            first_fault,
        )


@lru_cache(maxsize=4)
def _permute_chunks(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


@lru_cache(maxsize=2)
def open_chunks(store: str) -> Chunks:
    """The chunks of a stream, opened once per process."""
    return Chunks(store)


class LaneStream:
    """The rows of one rank's lanes, step by step.

    Uses Ray tasks, one chunk per lane ahead, when Ray is initialised in this process; else reads in this process.

    Args:
        store: Folder `write_stream` wrote.
        num_lanes: Sequences in a global batch.
        rank: This worker; it has the lanes j with j mod world_size = rank.
        world_size: Number of workers.
        cursor: Next row id of every lane, from a checkpoint; empty at the beginning.

    Raises:
        CorpusError: When there are fewer chunks than lanes, or the lanes do not fit the workers or the cursor.
    """

    def __init__(
        self, store: Path | str, *, num_lanes: int, rank: int, world_size: int, cursor: Sequence[int] = ()
    ) -> None:
        self._store = str(store)
        self._chunks = open_chunks(self._store)
        check_lanes(self._chunks, num_lanes)
        if num_lanes % world_size:
            raise CorpusError(f"world size {world_size} must divide train.global_batch_size={num_lanes}")
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
                reference = _start_task(self._store, position)
            self._ahead[lane] = (position + self._num_lanes, _start_task(self._store, position + self._num_lanes))
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


def check_lanes(chunks: Chunks, num_lanes: int) -> None:
    """Raises `CorpusError` when there are not enough chunks for every lane to have one of its own."""
    if len(chunks) < num_lanes:
        raise CorpusError(
            f"corpus.mode=on_the_fly: {len(chunks)} chunks of text cannot feed train.global_batch_size={num_lanes} lanes;"
            " give more text, a smaller batch, or use mode=store"
        )


def _start_task(store: str, position: int) -> Any:
    import ray

    # the default strategy, else the task would wait for room in the training workers' own placement group
    task = ray.remote(_read_chunk).options(num_cpus=0.25, scheduling_strategy="DEFAULT", max_retries=5)
    return task.remote(store, position)


def _read_chunk(store: str, position: int) -> ChunkRows:
    return open_chunks(store).read(position)
