"""Benchmark questions and held-out documents that stand in the corpus: a score on them would measure memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerplan.artifacts import compute_sha256
from layerplan.config.corpus import DecontaminationConfig
from layerplan.corpus.cleaning import normalize_text
from layerplan.corpus.codepoints import MULTIPLIER, Codes, encode_codes, fold_words, hash_ngrams

MAX_HELD_OUT_GRAMS = 256
"""n-grams by which a held-out document is known; those with the smallest mixed hashes, so that they are the same in every
copy. The share found among them is that of all within a few percent."""
SKETCH_BITS = 24
"""Size of the first look, one byte per slot: 16 MiB. With 500,000 question n-grams 3 % of a page's n-grams pass it."""


@dataclass(frozen=True)
class BenchmarkText:
    """One benchmark question, or held-out document, as the corpus may contain it."""

    id: str
    text: str
    is_held_out: bool = False
    """A document of a held-out text: which ones there are may change after a store was built."""


def hash_held_out(texts: Sequence[BenchmarkText], config: DecontaminationConfig) -> str:
    """Hash of the held-out documents that are looked for; empty when there is none."""
    looked_for = [[text.id, text.text] for text in texts if text.is_held_out and config.enabled]
    return compute_sha256(looked_for) if looked_for else ""


def fold_question(text: str) -> Codes:
    """Code points of a question as they are compared: normalised and folded as the documents it is looked for in."""
    return fold_words(encode_codes(normalize_text(text)))


@dataclass(frozen=True)
class Hit:
    """A question a document contains, and the share of the question's n-grams that were found."""

    question: str
    share: float


class QuestionIndex:
    """The questions' n-grams; finds the question a document contains.

    Text is compared without white space, punctuation, case and width. Questions shorter than one n-gram cannot be told
    from ordinary phrases and are left out; `num_too_short` counts them.
    """

    def __init__(self, questions: Sequence[BenchmarkText], config: DecontaminationConfig) -> None:
        self._config = config
        self._questions = [question.id for question in questions] if config.enabled else []
        grams = [self._question_grams(question) for question in questions] if config.enabled else []
        self._sizes = np.array([len(found) for found in grams], dtype=np.int64)
        self.num_too_short = int(np.sum(self._sizes == 0))
        hashes = np.concatenate([*grams, np.empty(0, dtype=np.uint64)])
        owners = np.repeat(np.arange(len(grams)), self._sizes)
        order = np.argsort(hashes, kind="stable")
        self._owners: NDArray[np.int64] = owners[order]
        self._hashes, self._starts = np.unique(hashes[order], return_index=True)
        self._stops = np.append(self._starts[1:], len(hashes))
        self._sketch = np.zeros(2**SKETCH_BITS, dtype=np.bool_)
        self._sketch[self._slots(self._hashes)] = True

    def find(self, text: str) -> Hit | None:
        """Returns the question of which the text holds the largest share, if that is at least `min_share`."""
        if len(self._hashes) == 0:
            return None
        grams = hash_ngrams(fold_words(encode_codes(text)), self._config.ngram)
        maybe = grams[self._sketch[self._slots(grams)]]
        places = np.searchsorted(self._hashes, maybe)
        places[places == len(self._hashes)] = 0
        places = places[self._hashes[places] == maybe]
        if len(places) == 0:
            return None
        places = np.unique(places)
        owners = np.concatenate([self._owners[self._starts[place] : self._stops[place]] for place in places])
        shares = np.bincount(owners, minlength=len(self._sizes)) / np.maximum(self._sizes, 1)
        best = int(np.argmax(shares))
        if shares[best] < self._config.min_share:
            return None
        return Hit(self._questions[best], float(shares[best]))

    def _question_grams(self, question: BenchmarkText) -> NDArray[np.uint64]:
        grams = np.unique(hash_ngrams(fold_question(question.text), self._config.ngram))
        if question.is_held_out and len(grams) > MAX_HELD_OUT_GRAMS:
            grams = grams[np.argpartition(grams * MULTIPLIER, MAX_HELD_OUT_GRAMS)[:MAX_HELD_OUT_GRAMS]]
        return grams

    def _slots(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (hashes >> np.uint64(64 - SKETCH_BITS)).astype(np.int64)
