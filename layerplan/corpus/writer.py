"""The ordered end of a build: count every record, drop duplicates, pack what is kept, have full shards written.

Threads write the shards. What the journal commits is how things stood when a shard's rows were complete, and only once that
shard and all before it are on disk; meanwhile the writer has gone on.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from layerplan.aside import PARTIAL_SUFFIX
from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.build_state import BuildState, SourceProgress, Standing
from layerplan.corpus.journal import BuildJournal
from layerplan.corpus.manifest import Shard, SourceRows
from layerplan.corpus.outcome import CONTAMINATED, FILTERED, KEPT, QUARANTINED
from layerplan.corpus.pack import Packer, RawRow, check_ids
from layerplan.corpus.shard_threads import ShardThreads
from layerplan.corpus.store import write_rows
from layerplan.corpus.tokenize import Record
from layerplan.corpus.upload import StoreUpload
from layerplan.errors import CorpusError
from layerplan.run_folder import CONTAMINATED_NAME, QUARANTINE_NAME, SHARD_PREFIX, VALIDATION_NAME

DUPLICATE = "duplicate"
VALIDATION_SHARE = 0.05
"""Rows are held out at this rate, from the beginning of each source, until it has given its part."""
COMMIT_EVERY_S = 30.0


class StoreWriter:
    """Takes records in order; continues where the journal says an earlier build stopped."""

    def __init__(
        self,
        config: CorpusConfig,
        store: Path,
        journal: BuildJournal,
        *,
        end_of_text_id: int,
        begin_ids: Sequence[int] = (),
        num_ids: int | None = None,
        seed: int,
        upload: StoreUpload | None = None,
    ) -> None:
        self._config = config
        self._upload = upload
        self._store = store
        self._journal = journal
        self._seed = seed
        self._num_ids = num_ids
        self._packer = Packer(config.seq_len, end_of_text_id, begin_ids)
        self._threads = ShardThreads(config.num_writers)
        self._standings: deque[Standing] = deque()
        self._rows: list[RawRow] = []
        self.validation: list[RawRow] = []
        self.state = BuildState()
        self.resumed = False
        with explain_disk_faults(store):
            self._restore()
            self._lists: dict[str, IO[bytes]] = {
                name: _open_list(store / name, length) for name, length in self.state.list_bytes.items()
            }
            self._move_shards(0)
        self._noted = time.monotonic()
        self._num_moved = self._num_noted_shards = self._num_shards = len(self.state.shards)
        self._num_rows = sum(shard["num_rows"] for shard in self.state.shards)

    def add(self, record: Record) -> None:
        """Counts a record and packs it when it is kept.

        Raises:
            CorpusError: When the disk is full or refuses; what was committed stays and a later build goes on.
        """
        with explain_disk_faults(self._store):
            self._add(record)
            self.state.unit, self.state.skip = record.unit, record.ordinal + 1
            if self._num_shards > self._num_noted_shards or time.monotonic() - self._noted > COMMIT_EVERY_S:
                self._note_standing()
            if self._standings:
                self._commit()

    def finish_source(self, source: int, *, next_unit: int) -> None:
        """Pads and writes what is left of a source; the next one starts with a shard of its own."""
        with explain_disk_faults(self._store):
            last = self._packer.finish()
            if last is not None:
                progress = self._progress(source)
                progress.num_padding_tokens = self._config.seq_len - last.used
                self._add_row(last, source)
            self._flush(everything=True)
            self.state.unit, self.state.skip = next_unit, 0
            self._note_standing()
            self._commit(everything=True)

    def write_validation(self) -> Shard | None:
        """Writes the held-out rows, if there are any, and returns their manifest entry."""
        if not self.validation:
            return None
        with explain_disk_faults(self._store):
            return write_rows(
                self._store / VALIDATION_NAME,
                self.validation,
                first_row_id=-len(self.validation),
                rows_per_group=self._config.rows_per_group,
            )

    def close(self) -> None:
        """Ends the threads and closes the lists; what an error cut short is committed as far as it is on disk."""
        self._threads.close()
        with suppress(OSError, pa.ArrowException, sqlite3.Error, CancelledError, CorpusError):
            self._commit()
        for handle in self._lists.values():
            handle.close()

    @property
    def counts(self) -> Counter[str]:
        """Documents of all sources."""
        return sum((progress.counts for progress in self.state.sources), Counter[str]())

    @property
    def shards(self) -> list[Shard]:
        """Shards on disk, with all before them."""
        return [Shard(**fields) for fields in self.state.shards]

    def list_sources(self) -> list[SourceRows]:
        """The manifest's entry of every source."""
        entries = []
        for source, progress in zip(self._config.sources, self.state.sources, strict=True):
            fields = {key: value for key, value in vars(progress).items() if key in SourceRows.model_fields}
            fields["counts"] = dict(sorted(progress.counts.items()))
            entries.append(SourceRows(path=source.path, weight=source.weight, **fields))
        return entries

    def _restore(self) -> None:
        loaded = self._journal.load()
        if loaded is not None:
            fields, rows = loaded
            sources = [
                SourceProgress(**source | {"counts": Counter(source["counts"])}) for source in fields.pop("sources")
            ]
            self.state = BuildState(**fields, sources=sources)
            self._rows, self.validation = rows.get("pending", []), rows.get("validation", [])
            if "open" in rows:
                self._packer.reopen(rows["open"][0])
            self.resumed = True
        self.state.sources += [SourceProgress() for _ in self._config.sources[len(self.state.sources) :]]
        kept = {shard["name"] for shard in self.state.shards}
        check_shards(self._store, kept, self._upload)
        for path in [*self._store.glob(f"{SHARD_PREFIX}*.parquet"), *self._store.glob(f"*{PARTIAL_SUFFIX}")]:
            if path.name not in kept:
                path.unlink()

    def _progress(self, source: int) -> SourceProgress:
        return self.state.sources[source]

    def _add(self, record: Record) -> None:
        progress = self._progress(record.source)
        status = record.status
        if status == KEPT and self._config.deduplicate and not self._journal.add_key(record.key):
            status = DUPLICATE
        progress.counts["in"] += record.num_documents
        progress.counts[f"{status}/{record.reason}" if status == FILTERED else status] += record.num_documents
        if status == QUARANTINED:
            self.state.lost_bytes += record.lost_bytes
            self.state.first_fault = self.state.first_fault or f"{record.id}: {record.reason}"
            entry = {"where": record.id, "reason": record.reason, "num_documents": record.num_documents}
            self._note(QUARANTINE_NAME, entry)
        else:
            progress.num_documents += 1
        if status == CONTAMINATED:
            path = self._config.sources[record.source].path
            entry = {"question": record.reason, "document": record.id, "source": path, "share": round(record.share, 4)}
            self._note(CONTAMINATED_NAME, entry)
        if status == KEPT:
            progress.num_control_documents += record.num_control_tokens > 0
            progress.num_control_tokens += record.num_control_tokens
            ids = np.frombuffer(record.ids, dtype=np.int32)
            check_ids(ids, self._num_ids, record.id)
            for row in self._packer.add(ids):
                progress.num_full_rows += 1
                self._add_row(row, record.source)

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        self._lists[name].write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n")

    def _add_row(self, row: RawRow, source: int) -> None:
        progress = self._progress(source)
        if row.used == self._config.seq_len and self._is_held_out(progress, source):
            progress.num_validation_rows += 1
            progress.num_validation_tokens += row.used
            self.validation.append(row)
            return
        self._rows.append(row)
        progress.num_rows += 1
        progress.num_tokens += row.used
        self._flush(everything=False)

    def _is_held_out(self, progress: SourceProgress, source: int) -> bool:
        count = len(self._config.sources)
        quota = self._config.validation_rows * (source + 1) // count - self._config.validation_rows * source // count
        if progress.num_validation_rows >= quota:
            return False
        place = progress.num_rows + progress.num_validation_rows
        draw = hashlib.blake2b(f"{self._seed} {source} {place}".encode(), digest_size=4).digest()
        return int.from_bytes(draw, "little") < VALIDATION_SHARE * 2**32

    def _flush(self, *, everything: bool) -> None:
        size = self._config.rows_per_group * self._config.groups_per_shard
        while len(self._rows) >= size or (everything and self._rows):
            rows, self._rows = self._rows[:size], self._rows[size:]
            path = self._store / f"{SHARD_PREFIX}{self._num_shards:06d}.parquet"
            self._threads.submit(path, rows, first_row_id=self._num_rows, rows_per_group=self._config.rows_per_group)
            self._num_shards += 1
            self._num_rows += len(rows)

    def _move_shards(self, first: int, stop: int | None = None) -> None:
        if self._upload is not None:
            move_shards(self._store, [shard["name"] for shard in self.state.shards[first:stop]], self._upload)

    def _note_standing(self) -> None:
        """Keeps how things stand after this record; what comes later must not be in the commit."""
        for name, handle in self._lists.items():
            handle.flush()
            self.state.list_bytes[name] = handle.tell()
        open_row = self._packer.open_row
        rows = {"pending": [*self._rows], "validation": [*self.validation], "open": [open_row] if open_row else []}
        sources = [vars(progress) | {"counts": dict(progress.counts)} for progress in self.state.sources]
        state = vars(self.state) | {"sources": sources, "list_bytes": dict(self.state.list_bytes)}
        self._standings.append(Standing(self._num_shards, state, rows))
        self._journal.mark()
        self._noted = time.monotonic()
        self._num_noted_shards = self._num_shards

    def _commit(self, *, everything: bool = False) -> None:
        """Commits what is on disk; `everything` waits for the threads."""
        for shard in self._threads.take(everything=everything):
            self.state.shards.append(shard.model_dump())
            self._commit_standings()
        self._commit_standings()

    def _commit_standings(self) -> None:
        while self._standings and self._standings[0].num_shards <= len(self.state.shards):
            standing = self._standings.popleft()
            shards = self.state.shards[: standing.num_shards]
            self._journal.commit(standing.state | {"shards": shards}, standing.rows)
            self._move_shards(self._num_moved, standing.num_shards)
            self._num_moved = standing.num_shards


def check_shards(store: Path, names: Iterable[str], upload: StoreUpload | None) -> None:
    """Checks that every shard is here or at the address it moves to.

    Raises:
        CorpusError: When one is at neither place, or the address cannot be listed.
    """
    missing = {name for name in names if not (store / name).exists()}
    if missing and upload is not None:
        with explain_disk_faults(upload.address):
            missing -= upload.list_names()
    if missing:
        raise CorpusError(f"{store / min(missing)}: is missing; remove {store} to build it again")


def move_shards(store: Path, names: Iterable[str], upload: StoreUpload) -> None:
    """Moves the finished shards that are still here; one whose copy was cut short by a kill is here, too.

    Raises:
        CorpusError: When the address refuses.
    """
    with explain_disk_faults(upload.address):
        for path in (store / name for name in names):
            if path.exists():
                upload.move(path)


@contextmanager
def explain_disk_faults(store: Path | str) -> Iterator[None]:
    """Turns a full or refusing disk or address into one clear error."""
    try:
        yield
    except (OSError, pa.ArrowException, sqlite3.Error) as error:
        text = " ".join(str(error).split())[:200]
        remedy = "make room" if isinstance(store, Path) else "see that it can be reached and written"
        raise CorpusError(
            f"{store}: cannot be written ({text}); every finished shard is kept: {remedy} and start the same build"
            " again to go on"
        ) from None


def _open_list(path: Path, length: int) -> IO[bytes]:
    """Opens a list for appending after its committed part."""
    path.touch()
    handle = path.open("rb+")
    handle.truncate(length)
    handle.seek(length)
    return handle
