"""The rows of text that layers are measured on: a part of the target corpus, cleaned and cut as training has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerplan.artifacts import hash_bytes
from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.decontamination import BenchmarkText
from layerplan.corpus.joining import read_joining
from layerplan.corpus.outcome import KEPT
from layerplan.corpus.pack import Packer
from layerplan.corpus.sources import list_units
from layerplan.corpus.store import StoreReader
from layerplan.corpus.tokenize import UnitTokenizer
from layerplan.errors import CorpusError
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_measurement import MeasuredText

LOOKED_AT = 4
"""Rows read for each that is chosen, so that the first documents of a corpus are not all of it."""


@dataclass(frozen=True)
class TextRows:
    """Rows of tokens, each taken as one text."""

    ids: NDArray[np.int32]
    """(rows, tokens)."""
    sources: tuple[str, ...]
    """Where they came from."""

    def describe(self, rows: Sequence[int] | None = None) -> MeasuredText:
        """These rows, or all of them, as a measurement names them."""
        ids = self.ids if rows is None else self.ids[list(rows)]
        content = np.ascontiguousarray(ids, dtype="<i4").tobytes()
        return MeasuredText(
            sources=list(self.sources), num_rows=len(ids), seq_len=ids.shape[1], sha256=hash_bytes(content)
        )


def read_text(
    corpus: CorpusConfig,
    model: ModelRef,
    *,
    num_rows: int,
    seq_len: int,
    seed: int,
    questions: Sequence[BenchmarkText] = (),
) -> TextRows:
    """Reads and chooses rows: as many of each source, or of the store where the config names one.

    Args:
        corpus: Sources, filters and joining.
        model: Whose tokenizer cuts the text.
        num_rows: Rows wanted.
        seq_len: Tokens of a row.
        seed: Of the choice among the rows that were read.
        questions: Documents that contain one of these are left out.

    Raises:
        CorpusError: When there is less text than wanted, or it cannot be read.
    """
    rng = np.random.default_rng([seed, num_rows, seq_len])
    if corpus.store is not None:
        return TextRows(_read_store(corpus.store, num_rows, seq_len, rng), (corpus.store,))
    shares = [len(part) for part in np.array_split(np.arange(num_rows), len(corpus.sources))]
    parts = []
    for index, share in enumerate(shares):
        if share == 0:
            continue
        source = corpus.sources[index]
        one = corpus.model_copy(update={"sources": [source]})
        rows = _take(_iter_rows(one, model, seq_len, questions), LOOKED_AT * share)
        if len(rows) < share:
            raise CorpusError(
                f"corpus.sources.{index}.path={source.path}: has {len(rows)} rows of {seq_len} tokens, a measurement needs"
                f" {share}; give more text, or lower measure.num_rows, measure.seq_len or the steps of the pilot"
            )
        parts.append(np.stack([rows[number] for number in rng.permutation(len(rows))[:share]]))
    chosen = np.concatenate(parts)
    return TextRows(chosen[rng.permutation(len(chosen))], tuple(source.path for source in corpus.sources))


def _read_store(store: str, num_rows: int, seq_len: int, rng: np.random.Generator) -> NDArray[np.int32]:
    reader = StoreReader(store)
    manifest = reader.manifest
    if manifest.num_rows < num_rows or manifest.seq_len < seq_len:
        raise CorpusError(
            f"corpus.store={store}: has {manifest.num_rows} rows of {manifest.seq_len} tokens, a measurement needs"
            f" {num_rows} of {seq_len}; lower measure.num_rows, measure.seq_len or the steps of the pilot"
        )
    chosen = rng.choice(manifest.num_rows, num_rows, replace=False)
    return np.ascontiguousarray(reader.read_rows(chosen.astype(np.int64)).input_ids[:, :seq_len])


def _iter_rows(
    corpus: CorpusConfig, model: ModelRef, seq_len: int, questions: Sequence[BenchmarkText]
) -> Iterator[NDArray[np.int32]]:
    """Whole rows of one source, in its order."""
    tokenizer = model.tokenizer_file()
    joining = read_joining(corpus, tokenizer)
    reader = UnitTokenizer(corpus, tokenizer.read_text(encoding="utf-8"), questions)
    packer = Packer(seq_len, joining.end_of_text_id, joining.begin_ids)
    for number, unit in enumerate(list_units(corpus)):
        for records in reader.read(number, unit):
            for record in records:
                if record.status == KEPT:
                    yield from (row.input_ids for row in packer.add(np.frombuffer(record.ids, dtype=np.int32)))


def _take(rows: Iterator[NDArray[np.int32]], count: int) -> list[NDArray[np.int32]]:
    return [row for row, _ in zip(rows, range(count))]
