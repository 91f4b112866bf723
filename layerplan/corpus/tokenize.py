"""The parallel part of a build: read, clean and tokenize one unit, as a class mapped over units by Ray Data.

The class is stateful because the tokenizer and the question index are loaded once per actor. It emits one record per
document, dropped ones included, so that the counts of a build add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.cleaning import compute_duplicate_key, find_filter_reason, normalize_text
from layerplan.corpus.decontamination import QuestionIndex
from layerplan.corpus.sources import Document, Malformed, Unit, read_unit

KEPT, FILTERED, CONTAMINATED, QUARANTINED = "kept", "filtered", "contaminated", "quarantined"
BATCH_DOCUMENTS = 64
BATCH_CHARS = 2_000_000


class UnitTokenizer:
    """Maps a unit to records `source, id, status, reason, key, ids`."""

    def __init__(self, config: CorpusConfig, tokenizer_json: str, questions: list[Any]) -> None:
        self._config = config
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._index = QuestionIndex(questions, config.decontamination)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Yields record batches of bounded size for every unit in the batch."""
        for source, path, format_name in zip(batch["source"], batch["path"], batch["format"]):
            unit = Unit(int(source), str(path), str(format_name))
            yield from self._read(unit)

    def _read(self, unit: Unit) -> Iterator[dict[str, list[Any]]]:
        pending: list[tuple[dict[str, Any], str]] = []
        num_chars = 0
        for item in read_unit(unit, self._config.sources[unit.source]):
            record, text = self._judge(item, unit)
            pending.append((record, text))
            num_chars += len(text)
            if len(pending) >= BATCH_DOCUMENTS or num_chars >= BATCH_CHARS:
                yield self._encode(pending)
                pending, num_chars = [], 0
        if pending:
            yield self._encode(pending)

    def _judge(self, item: Document | Malformed, unit: Unit) -> tuple[dict[str, Any], str]:
        record = {"source": unit.source, "id": "", "status": KEPT, "reason": "", "key": b""}
        if isinstance(item, Malformed):
            return record | {"id": item.where, "status": QUARANTINED, "reason": item.reason}, ""
        text = normalize_text(item.text)
        record |= {"id": item.id, "key": compute_duplicate_key(text)}
        reason = find_filter_reason(text, item.score, self._config.filters)
        if reason is not None:
            return record | {"status": FILTERED, "reason": reason}, ""
        question = self._index.find(text)
        if question is not None:
            return record | {"status": CONTAMINATED, "reason": question}, ""
        return record, text

    def _encode(self, pending: list[tuple[dict[str, Any], str]]) -> dict[str, list[Any]]:
        encodings = self._tokenizer.encode_batch_fast([text for _, text in pending], add_special_tokens=False)
        columns: dict[str, list[Any]] = {name: [record[name] for record, _ in pending] for name in pending[0][0]}
        columns["ids"] = [np.asarray(encoding.ids, dtype=np.int32).tobytes() for encoding in encodings]
        return columns
