"""What a build needs to go on after it was killed, committed together with every shard it wrote.

One SQLite file holds the keys of the documents seen, so that de-duplication needs bounded memory whatever the corpus, and
the state of the writer. Both change in one transaction: a kill at any moment leaves the last commit, and what was
written to disk after it is written again, byte for byte. The writer is ahead of its commits, since shards are still being
written: keys wait in memory from where they were marked until that mark is committed.
"""

from __future__ import annotations

import io
import json
import sqlite3
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layerplan.corpus.pack import RawRow
from layerplan.errors import CorpusError
from layerplan.run_folder import JOURNAL_NAME

CACHE_KIB = 128 * 1024


class BuildJournal:
    """The journal of one store; open for as long as the build runs.

    Raises:
        CorpusError: When another build holds it, it is of another config, or the disk refuses.
    """

    def __init__(self, store: Path, identity: str, joining: str = "") -> None:
        self._path = store / JOURNAL_NAME
        self._is_broken = False
        self._waiting: set[bytes] = set()
        self._keys: deque[list[bytes]] = deque([[]])
        self._connection = _connect(self._path)
        try:
            for statement in (
                "PRAGMA locking_mode=EXCLUSIVE",
                "PRAGMA journal_mode=TRUNCATE",
                f"PRAGMA cache_size=-{CACHE_KIB}",
                "BEGIN IMMEDIATE",
                "CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY) WITHOUT ROWID",
                "CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value BLOB)",
            ):
                self._connection.execute(statement)
            known, known_joining = self._read("identity"), self._read("joining")
        except sqlite3.Error as error:
            self._connection.close()
            if "locked" in str(error):
                raise CorpusError(f"{store}: another build is writing to it; wait for it or stop it") from None
            raise CorpusError(f"{self._path}: cannot be opened ({error})") from None
        if known is None:
            self._write("identity", identity.encode())
            self._write("joining", joining.encode())
        elif known.decode() != identity:
            raise CorpusError(
                f"{store}: an unfinished build with another corpus config, tokenizer or input files; remove it or choose"
                " another name"
            )
        elif (known_joining or b"").decode() != joining:
            before = known_joining.decode() if known_joining else "joined as an earlier version did, which is not noted"
            raise CorpusError(
                f"{store}: an unfinished build whose documents are {before}, now they would be {joining}; remove it or"
                " choose another name"
            )

    def add_key(self, key: bytes) -> bool:
        """Notes a document's key; False when it was there before."""
        if key in self._waiting:
            return False
        if self._connection.execute("SELECT 1 FROM seen WHERE key = ?", (key,)).fetchone() is not None:
            return False
        self._waiting.add(key)
        self._keys[-1].append(key)
        return True

    def mark(self) -> None:
        """What comes from here on belongs to a later commit than what came before."""
        self._keys.append([])

    def load(self) -> tuple[dict[str, Any], dict[str, list[RawRow]]] | None:
        """The state and rows of the last commit, or None."""
        state = self._read("state")
        return None if state is None else (json.loads(state), _load_rows(self._read("rows") or b""))

    def commit(self, state: Mapping[str, Any], rows: Mapping[str, Iterable[RawRow]]) -> None:
        """Makes permanent what came before the oldest mark, or everything when nothing is marked."""
        if self._is_broken:
            raise sqlite3.OperationalError("an earlier commit failed")
        self._is_broken = True  # SQLite may end a transaction that fails: what follows would be permanent one by one
        keys = self._keys.popleft()
        if not self._keys:
            self.mark()
        self._connection.executemany("INSERT OR IGNORE INTO seen VALUES (?)", ((key,) for key in keys))
        self._waiting.difference_update(keys)
        self._write("state", json.dumps(state).encode())
        self._write("rows", _dump_rows(rows))
        self._connection.execute("COMMIT")
        self._connection.execute("BEGIN IMMEDIATE")
        self._is_broken = False

    def close(self) -> None:
        """Drops what was not committed and lets another build in."""
        self._connection.close()

    def remove(self) -> None:
        """Ends a finished build."""
        self.close()
        remove_journal(self._path.parent)

    def _read(self, name: str) -> bytes | None:
        row = self._connection.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def _write(self, name: str, value: bytes) -> None:
        self._connection.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, value))


def _connect(path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(path, isolation_level=None, timeout=0)
    except sqlite3.Error as error:
        raise CorpusError(f"{path}: cannot be opened ({error})") from None


def remove_journal(store: Path) -> None:
    """Removes the journal of a finished store, if a kill left it there."""
    for ending in ("", "-journal"):
        (store / (JOURNAL_NAME + ending)).unlink(missing_ok=True)


def _dump_rows(groups: Mapping[str, Iterable[RawRow]]) -> bytes:
    arrays: dict[str, Any] = {}
    for name, rows in groups.items():
        kept = list(rows)
        if kept:
            arrays[f"{name}.ids"] = np.stack([row.input_ids for row in kept])
            arrays[f"{name}.used"] = np.array([row.used for row in kept], dtype=np.int32)
            arrays[f"{name}.starts"] = np.concatenate([row.starts for row in kept])
            arrays[f"{name}.counts"] = np.array([len(row.starts) for row in kept], dtype=np.int32)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _load_rows(content: bytes) -> dict[str, list[RawRow]]:
    groups: dict[str, list[RawRow]] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for name in {key.partition(".")[0] for key in arrays}:
            starts = np.split(arrays[f"{name}.starts"], np.cumsum(arrays[f"{name}.counts"])[:-1])
            groups[name] = [
                RawRow(ids, row_starts, int(used))
                for ids, row_starts, used in zip(
                    arrays[f"{name}.ids"], starts, arrays[f"{name}.used"].tolist(), strict=True
                )
            ]
    return groups
