"""Scores as values whose counts add up, with the three averages people mean by "accuracy"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Literal

from pydantic import Field, model_validator

from eval.items import CATEGORIES, LETTERS, Benchmark
from layerplan.config.base import StrictModel

Protocol = Literal["logit", "generate"]


class Answer(StrictModel):
    """One question, asked and answered."""

    id: str
    """Question id, `subject/number`."""
    prompt: str
    """What the model saw."""
    output: str
    """What it generated; empty for `logit`."""
    letter_logprobs: tuple[float, float, float, float] | None = None
    """Log-probabilities of the bare letters A to D at the answer position."""
    predicted: str | None
    """Extracted letter, None when unparsed."""
    answer: str
    """Key."""

    @property
    def is_correct(self) -> bool:
        """Whether the letter is the key."""
        return self.predicted == self.answer


class ScoreOrigin(StrictModel):
    """Which weights were scored, and by what."""

    model: str
    """Folder name or hub id."""
    revision: str = "main"
    """Revision on the hub."""
    weights_sha256: str | None = None
    """Hash of a folder's weight files."""
    style: str = "official"
    """Prompt style."""
    num_few_shot: int = 0
    """Solved examples before each question."""
    backend: str
    """Engine."""
    dtype: str
    """Precision it was computed in; `auto` in scores of versions that recorded what was asked for."""
    encoding: str = ""
    """Begin token, letters' tokens and control tokens, where prompts are encoded otherwise than by earlier versions."""
    config_sha256: str | None = None
    """Hash of the values of the model's config; None in scores of versions that did not look."""

    def is_that_of(self, other: ScoreOrigin) -> bool:
        """Whether both come from the same, as far as both know."""
        mine, theirs = (each.model_copy(update={"config_sha256": None}) for each in (self, other))
        return mine == theirs and (None in (self.config_sha256, other.config_sha256) or self == other)


class EvaluationResult(StrictModel):
    """One model on one benchmark under one protocol."""

    benchmark: str
    """Benchmark name."""
    protocol: Protocol
    """How the answer was read."""
    protocol_id: str
    """Hash of split, prompts, extraction and decoding; unequal ids cannot be compared."""
    content_sha256: str
    """Hash of the questions."""
    num_asked: int = Field(ge=1)
    """Questions asked."""
    num_correct: int
    """Right answers."""
    num_wrong: int
    """Wrong letters."""
    num_unparsed: int
    """Outputs without a single answer; they count as wrong."""
    num_ties: int = 0
    """`logit` only: questions whose best letters were tied; the first letter was taken."""
    subjects: dict[str, tuple[int, int]]
    """Per subject: right answers and questions."""
    categories: dict[str, float]
    """Per category: mean of its subjects' accuracies, in percent."""
    category_mean: float
    """Mean of the categories (the paper's average), percent."""
    subject_mean: float
    """Mean over subjects (the official one), percent."""
    question_mean: float
    """Question-weighted (lm-eval's), percent."""
    china_specific: float | None = None
    """Mean of the China-specific subjects, percent; a tag that overlaps the categories."""
    repeats: tuple[float, ...] = ()
    """Category mean of every repeated evaluation, percent (Table 10)."""
    num_unstable: int = 0
    """Questions whose predicted letter differed between repeats."""
    origin: ScoreOrigin | None = None
    """What was scored."""

    @property
    def repeat_std(self) -> float | None:
        """Standard deviation of the category mean over the repeats, points; None for fewer than two."""
        return stdev(self.repeats) if len(self.repeats) > 1 else None

    @model_validator(mode="after")
    def _counts_add_up(self) -> EvaluationResult:
        if self.num_correct + self.num_wrong + self.num_unparsed != self.num_asked:
            raise ValueError(
                f"correct {self.num_correct} + wrong {self.num_wrong} + unparsed {self.num_unparsed}"
                f" is not asked {self.num_asked}"
            )
        if sum(asked for _, asked in self.subjects.values()) != self.num_asked:
            raise ValueError("the subjects' questions do not add up to the questions asked")
        return self


def score_answers(
    benchmark: Benchmark,
    protocol: Protocol,
    protocol_id: str,
    repeats: Sequence[Sequence[Answer]],
    *,
    origin: ScoreOrigin | None = None,
) -> EvaluationResult:
    """Turns one answer per question, in the benchmark's order, into a result.

    Args:
        benchmark: The questions.
        protocol: How the answers were read.
        protocol_id: Hash of what decides a score.
        repeats: The answers of each repeated evaluation; the first one is the score.
        origin: What was scored.
    """
    answers = repeats[0]
    right, asked = _count(benchmark, answers)
    category_of = {question.subject: question.category for question in benchmark.questions}
    china_specific = {question.subject for question in benchmark.questions if question.is_china_specific}
    accuracy = {subject: 100 * right[subject] / asked[subject] for subject in asked}
    categories = _category_means(accuracy, category_of)
    unparsed = sum(answer.predicted is None for answer in answers)
    correct = sum(right.values())
    return EvaluationResult(
        benchmark=benchmark.name,
        protocol=protocol,
        protocol_id=protocol_id,
        content_sha256=benchmark.content_sha256,
        num_asked=len(answers),
        num_correct=correct,
        num_wrong=len(answers) - correct - unparsed,
        num_unparsed=unparsed,
        num_ties=sum(_is_tied(answer) for answer in answers) if protocol == "logit" else 0,
        subjects={subject: (right[subject], asked[subject]) for subject in asked},
        categories=categories,
        category_mean=_mean(list(categories.values())),
        subject_mean=_mean(list(accuracy.values())),
        question_mean=100 * correct / len(answers),
        china_specific=_mean([accuracy[subject] for subject in asked if subject in china_specific])
        if china_specific
        else None,
        repeats=tuple(_category_mean(benchmark, repeat) for repeat in repeats),
        num_unstable=sum(len({item.predicted for item in items}) > 1 for items in zip(*repeats, strict=True)),
        origin=origin,
    )


def _count(benchmark: Benchmark, answers: Sequence[Answer]) -> tuple[Counter[str], Counter[str]]:
    """Right answers and questions per subject."""
    right, asked = Counter[str](), Counter[str]()
    for question, answer in zip(benchmark.questions, answers, strict=True):
        assert question.id == answer.id, "answers come in the benchmark's order"
        asked[question.subject] += 1
        right[question.subject] += answer.is_correct
    return right, asked


def _category_means(accuracy: Mapping[str, float], category_of: Mapping[str, str]) -> dict[str, float]:
    return {
        category: _mean([value for subject, value in accuracy.items() if category_of[subject] == category])
        for category in CATEGORIES
        if category in category_of.values()
    }


def _category_mean(benchmark: Benchmark, answers: Sequence[Answer]) -> float:
    right, asked = _count(benchmark, answers)
    category_of = {question.subject: question.category for question in benchmark.questions}
    accuracy = {subject: 100 * right[subject] / asked[subject] for subject in asked}
    return _mean(list(_category_means(accuracy, category_of).values()))


def pick_letter(logprobs: Sequence[float]) -> str:
    """The likeliest letter; the first one on a tie."""
    return LETTERS[max(range(len(LETTERS)), key=lambda index: (logprobs[index], -index))]


def _is_tied(answer: Answer) -> bool:
    values = answer.letter_logprobs
    return values is not None and sum(value == max(values) for value in values) > 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
