"""Chunks of raw text, made to rows while training: what `stream.json` holds, and one chunk read by its position."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.location import open_file
from layerplan.corpus.outcome import FILTERED, KEPT, QUARANTINED
from layerplan.corpus.pack import Packer, RawRow, check_ids
from layerplan.corpus.unit import Unit
from layerplan.run_folder import STREAM_NAME
from layerplan.storage.address import join_location

if TYPE_CHECKING:
    from layerplan.corpus.tokenize import UnitTokenizer

FORMER_POLICY = "token"
"""What streams that name no `corpus.control_tokens` did with one."""


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
        self._questions = content["questions"]
        self._tokenizer: UnitTokenizer | None = None

    def __len__(self) -> int:
        return len(self._chunks)

    def read(self, position: int) -> ChunkRows:
        """Reads, cleans, tokenizes and packs the chunk at a position of the endless row of chunks."""
        tokenizer = self._tokenizer = self._tokenizer or self._open_tokenizer()
        epoch, place = divmod(position, len(self))
        number = int(_permute_chunks(len(self), self._seed, epoch)[place])
        packer = Packer(self.config.seq_len, self._end_of_text_id, self._begin_ids)
        rows: list[RawRow] = []
        counts: Counter[str] = Counter()
        first_fault = ""
        for fields in self._chunks[number]:
            for record in (record for batch in tokenizer.read(number, Unit(*fields)) for record in batch):
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

    def _open_tokenizer(self) -> UnitTokenizer:
        # imported by who reads chunks alone: a training worker that takes rows needs no tokenizer library
        from layerplan.corpus.decontamination import BenchmarkText
        from layerplan.corpus.tokenize import UnitTokenizer

        questions = [BenchmarkText(**fields) for fields in self._questions]
        return UnitTokenizer(self.config, self._tokenizer_json, questions)


@lru_cache(maxsize=4)
def _permute_chunks(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


@lru_cache(maxsize=2)
def open_chunks(store: str) -> Chunks:
    """The chunks of a stream, opened once per process."""
    return Chunks(store)
