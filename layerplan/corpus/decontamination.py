"""Benchmark questions that stand in the corpus: a score on them would measure memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from layerplan.config.corpus import DecontaminationConfig

_NOT_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class BenchmarkText:
    """One benchmark question as the corpus may contain it."""

    id: str
    text: str


class QuestionIndex:
    """The questions' n-grams; finds the question a document contains.

    Text is compared without white space, punctuation and case. Questions shorter than one n-gram cannot be told from
    ordinary phrases and are left out; `num_too_short` counts them.
    """

    def __init__(self, questions: Sequence[BenchmarkText], config: DecontaminationConfig) -> None:
        self._ngram = config.ngram
        self._min_share = config.min_share
        self._sizes: dict[str, int] = {}
        self._owners: dict[str, list[str]] = {}
        self.num_too_short = 0
        for question in questions if config.enabled else ():
            grams = self._grams(question.text)
            if not grams:
                self.num_too_short += 1
            self._sizes[question.id] = len(grams)
            for gram in grams:
                self._owners.setdefault(gram, []).append(question.id)

    def find(self, text: str) -> str | None:
        """Returns the id of a question whose n-grams occur in the text to at least `min_share`, else None."""
        if not self._owners:
            return None
        shared = Counter(owner for gram in self._grams(text) & self._owners.keys() for owner in self._owners[gram])
        for identifier, count in shared.most_common():
            if count / self._sizes[identifier] >= self._min_share:
                return identifier
        return None

    def _grams(self, text: str) -> set[str]:
        plain = _NOT_WORD.sub("", text).lower()
        return {plain[i : i + self._ngram] for i in range(len(plain) - self._ngram + 1)}
