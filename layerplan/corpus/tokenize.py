"""The parallel part of a build: read, clean and tokenize units, as a class mapped over units by Ray Data.

The class is stateful because the tokenizer and the question index are loaded once per actor. It emits one record per
document, dropped ones included, so that the counts of a build add up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.cleaning import compute_duplicate_key, find_filter_reason, normalize_text
from layerplan.corpus.decontamination import BenchmarkText, QuestionIndex
from layerplan.corpus.encoders import load_encoder
from layerplan.corpus.long_texts import cut_text
from layerplan.corpus.outcome import CONTAMINATED, FILTERED, KEPT, QUARANTINED
from layerplan.corpus.readers import Document, Malformed, read_unit
from layerplan.corpus.unit import Unit
from layerplan.models.control_tokens import ControlTokens

BATCH_DOCUMENTS = 256
BATCH_CHARS = 1_000_000


@dataclass(frozen=True)
class Record:
    """What became of one document.

    Attributes:
        unit: Number of its unit in the list handed in.
        ordinal: Its place among the unit's documents, malformed ones included.
        source: Index of its source.
        id: Document id, or where a malformed one stands.
        status: `kept`, `filtered`, `contaminated` or `quarantined`.
        reason: Filter, benchmark question, or what was malformed.
        share: Share of the question's n-grams in a contaminated document.
        num_documents: Documents it stands for; a lost row group is many.
        lost_bytes: Bytes of the input nobody could look at.
        key: De-duplication key of a kept document.
        num_control_tokens: Control tokens that a kept document spells out.
        ids: Token ids of a kept document, int32.
    """

    unit: int
    ordinal: int
    source: int
    id: str
    status: str = KEPT
    reason: str = ""
    share: float = 0.0
    num_documents: int = 1
    lost_bytes: int = 0
    key: bytes = b""
    num_control_tokens: int = 0
    ids: bytes = b""


_SCHEMA = pa.schema(
    [
        ("unit", pa.int64()),
        ("ordinal", pa.int64()),
        ("source", pa.int32()),
        ("id", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("share", pa.float64()),
        ("num_documents", pa.int64()),
        ("lost_bytes", pa.int64()),
        ("key", pa.binary()),
        ("num_control_tokens", pa.int64()),
        ("ids", pa.large_binary()),
    ]
)


class UnitTokenizer:
    """Maps numbered units to `Record`s, in order."""

    def __init__(self, config: CorpusConfig, tokenizer_json: str, questions: Sequence[BenchmarkText]) -> None:
        self._config = config
        self._encoder = load_encoder(tokenizer_json, config.tokenizer_library, config.control_tokens)
        self._control = ControlTokens.from_json(tokenizer_json)
        self._index = QuestionIndex(questions, config.decontamination)

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        """Yields record tables of bounded size for the units of each item."""
        for item in batch["units"]:
            for number, fields in json.loads(str(item)):
                for records in self.read(number, Unit(*fields)):
                    yield _make_table(records)

    def read(self, number: int, unit: Unit) -> Iterator[list[Record]]:
        """Yields the records of one unit in batches."""
        pending: list[tuple[Record, str]] = []
        num_chars = num_documents = 0
        limit = self._config.sources[unit.source].max_documents
        for ordinal, item in enumerate(read_unit(unit, self._config.sources[unit.source])):
            if ordinal >= unit.skip:
                record, text = self._judge(item, Record(number, ordinal, unit.source, ""))
                pending.append((record, text))
                num_chars += len(text)
            num_documents += isinstance(item, Document)
            if len(pending) >= BATCH_DOCUMENTS or num_chars >= BATCH_CHARS:
                yield self._encode(pending)
                pending, num_chars = [], 0
            if limit is not None and num_documents >= limit:
                break
        if pending:
            yield self._encode(pending)

    def _judge(self, item: Document | Malformed, place: Record) -> tuple[Record, str]:
        fields = vars(place)
        if isinstance(item, Malformed):
            lost = {"num_documents": item.num_documents, "lost_bytes": item.lost_bytes}
            return Record(**fields | lost | {"id": item.where, "status": QUARANTINED, "reason": item.reason}), ""
        fields = fields | {"id": item.id}
        text = normalize_text(item.text)
        reason = find_filter_reason(text, item.score, self._config.filters)
        if reason is not None:
            return Record(**fields | {"status": FILTERED, "reason": reason}), ""
        hit = self._index.find(text)
        if hit is not None:
            found = {"status": CONTAMINATED, "reason": hit.question, "share": hit.share}
            return Record(**fields | found), ""
        kept = {"key": compute_duplicate_key(text), "num_control_tokens": self._control.count(text)}
        return Record(**fields | kept), text

    def _encode(self, pending: list[tuple[Record, str]]) -> list[Record]:
        pieces = [cut_text(text, self._encoder) for _, text in pending]
        encoded = iter(self._encoder.encode([piece.text for parts in pieces for piece in parts]))
        records = []
        for (record, _), parts in zip(pending, pieces, strict=True):
            ids = b"".join(piece.take(next(encoded)) for piece in parts)
            records.append(Record(**vars(record) | {"ids": ids}))
        return records


def _make_table(records: list[Record]) -> pa.Table:
    return pa.Table.from_pylist([vars(record) for record in records], schema=_SCHEMA)
