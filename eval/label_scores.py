"""Scores of next-token classification: accuracy, macro and weighted F1, their intervals, and paired tests.

A prediction is the model's most likely next token over its whole vocabulary; one that is no label is wrong for its class
and right for none. F1 is per class, 2 TP / (2 TP + FP + FN), and 0 for a class with none of them; macro is the plain mean
over the classes (the paper's: 0.399 is a test of MRPC answered with its larger class), weighted counts each by its prompts.

Intervals resample nothing: a drawn test lacks classes, which would then score 0. Bias and variance are the jackknife's
(Efron and Stein 1981), the interval Wilson's with as many prompts as would give a share that variance (Korn and Graubard
1998), so that it ends within 0 and 1 and has a width where all is right; it is widened to hold the metric itself,
and that of a macro F1 by what classes without a right answer, which have no variance, could still be worth. That of
a difference is put together of both models' (Newcombe 1998; Zou and Donner 2008). Tests exchange predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.stats import norm

from eval.significance import bound_unseen_share, compute_mcnemar
from layerplan.config.base import StrictModel
from layerplan.errors import EvaluationError

EXCHANGES = 2000
"""Of two models' predictions behind a test, at least; as many more as comparisons that are corrected together need."""
PER_TEST = 400
"""Exchanges for each of them: the least p after Bonferroni is then 1 / 400, a twentieth of what is told apart."""
ENOUGH = 100
"""A test with so many exchanges that differ as much ends: more would not change what is said (Besag and Clifford 1991)."""
CHUNK = 4_000_000
"""Exchanges are drawn by so many numbers at a time."""
Metric = Literal["accuracy", "macro_f1", "weighted_f1"]
METRICS: tuple[Metric, ...] = ("accuracy", "macro_f1", "weighted_f1")
NONE = -1
"""Class of a prediction that is no label."""
Classes = NDArray[np.int64]
Counts = NDArray[np.int64]
Shares = NDArray[np.float64]
TINY = 1e-12
"""Differences of shares below this are rounding."""


class LabelScores(StrictModel):
    """What a model's predictions on a test are worth; shares, with 95 % intervals."""

    task: str
    """Name of the task."""
    task_sha256: str
    """Hash of its prompts, labels and splits."""
    classes: tuple[str, ...]
    """In the order of the counts."""
    num_asked: int = Field(ge=1)
    """Prompts of the test."""
    num_no_label: int = Field(ge=0)
    """Predictions that are none of the labels; they count as wrong."""
    confusion: tuple[tuple[int, ...], ...]
    """Prompts by their class (rows) and the predicted one; the last column is no label."""
    accuracy: float = Field(ge=0, le=1)
    """Share of right predictions."""
    macro_f1: float = Field(ge=0, le=1)
    """Mean of the classes' F1."""
    weighted_f1: float = Field(ge=0, le=1)
    """The same, each class counted by its prompts."""
    intervals: dict[Metric, tuple[float, float]]
    """Wilson's, for the others than accuracy with the number of prompts that their variance is worth."""

    @model_validator(mode="after")
    def _counts_add_up(self) -> LabelScores:
        counts = np.array(self.confusion)
        if counts.sum() != self.num_asked or counts[:, -1].sum() != self.num_no_label:
            raise ValueError(f"confusion: {counts.sum()} prompts for num_asked={self.num_asked}")
        return self


class LabelVerdict(StrictModel):
    """The difference of two models on one test, prompt by prompt."""

    metric: Metric
    """What is compared."""
    difference: float
    """Of the second from the first, as a share."""
    interval: tuple[float, float]
    """95 %, over prompts that both answered."""
    p_value: float = Field(ge=0, le=1)
    """Two-sided: exact McNemar for the accuracy of single runs, else exchanged predictions."""


def score_labels(
    gold: Sequence[int], predicted: Sequence[int], classes: Sequence[str], *, task: str, task_sha256: str
) -> LabelScores:
    """Scores predictions.

    Args:
        gold: Index of each prompt's class.
        predicted: Index of the predicted class, or `NONE`.
        classes: Names of the classes.
        task: Name of the task.
        task_sha256: Its hash.

    Raises:
        EvaluationError: When there are not as many predictions as prompts.
    """
    truth, guess = _check(gold, predicted)
    num_classes = len(classes)
    counts = count_confusion(truth, guess, num_classes)
    values = {metric: compute_metric(counts, metric) for metric in METRICS}
    intervals = {metric: _measure(truth, guess[None, :], num_classes, metric).interval for metric in METRICS}
    return LabelScores(
        task=task,
        task_sha256=task_sha256,
        classes=tuple(classes),
        num_asked=len(truth),
        num_no_label=int((guess == NONE).sum()),
        confusion=tuple(map(tuple, counts.tolist())),
        intervals=intervals,
        **values,
    )


def compare_labels(
    gold: Sequence[int], first: Sequence[int], second: Sequence[int], num_classes: int, *, seed: int = 0
) -> dict[Metric, LabelVerdict]:
    """Tests by metric whether the second model's predictions differ from the first's in what they are worth.

    Raises:
        EvaluationError: When there are not as many predictions as prompts.
    """
    return compare_seeds(gold, [first], [second], num_classes, seed=seed)


def compare_seeds(
    gold: Sequence[int],
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    num_classes: int,
    *,
    num_tests: int = 1,
    seed: int = 0,
) -> dict[Metric, LabelVerdict]:
    """The same of two methods, each trained with several seeds: a metric is the mean over a method's seeds.

    Prompts are drawn and exchanged with the predictions of all seeds on them, so that seeds count as no more prompts than
    there are. The verdict is about these seeds; it says nothing of others.

    Args:
        gold: Index of each prompt's class.
        first: Index of the predicted class, or `NONE`, for each seed of the first method.
        second: The same of the second method.
        num_classes: Of the task.
        num_tests: Tests that p will be corrected for together, these among them: p of a test by exchange is no smaller than
            one over the exchanges, so that there are more of them for more tests.
        seed: Of the exchanges.

    Raises:
        EvaluationError: When there are not as many predictions as prompts, or not as many seeds of both methods.
    """
    if len(first) != len(second) or not first:
        raise EvaluationError(f"{len(second)} seeds compared with {len(first)}; as many of both methods are needed")
    truth = _check(gold, first[0])[0]
    one, two = (np.stack([_check(gold, predicted)[1] for predicted in arm]) for arm in (first, second))
    p_values = _exchange(truth, one, two, num_classes, num_tests, np.random.default_rng(seed))
    if len(one) == 1:
        right = one[0] == truth, two[0] == truth
        p_values["accuracy"] = compute_mcnemar(int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
    return {metric: _compare(truth, one, two, num_classes, metric, p_values[metric]) for metric in METRICS}


def _compare(
    truth: Classes, one_SN: Classes, two_SN: Classes, num_classes: int, metric: Metric, p_value: float
) -> LabelVerdict:
    one, two = (_measure(truth, guess_SN, num_classes, metric) for guess_SN in (one_SN, two_SN))
    return LabelVerdict(metric=metric, difference=two.value - one.value, interval=_subtract(two, one), p_value=p_value)


@dataclass(frozen=True)
class _Measured:
    """A metric, the mean over seeds, with its uncertainty over prompts."""

    value: float
    interval: tuple[float, float]
    influence_N: Shares
    """How far each prompt moves the metric, times the number of prompts; adds up to 0."""


def _measure(truth: Classes, guess_SN: Classes, num_classes: int, metric: Metric) -> _Measured:
    confusions = [count_confusion(truth, guess, num_classes) for guess in guess_SN]
    value = float(np.mean([compute_metric(confusion, metric) for confusion in confusions]))
    left_out = [_leave_out(truth, guess, confusion, metric) for guess, confusion in zip(guess_SN, confusions)]
    without_N, size = np.mean(left_out, axis=0), len(truth)
    bias = (size - 1) * (float(without_N.mean()) - value)
    influence_N = (size - 1) * (without_N.mean() - without_N)
    variance = float(influence_N @ influence_N) / size**2
    asked = confusions[0].sum(1)
    # where no prompt moves the metric, as at 0 and 1, a mean over classes is worth as many prompts as its rarest allow
    whole = float((asked > 0).sum() ** 2 / (1 / asked[asked > 0]).sum()) if metric == "macro_f1" else float(size)
    low, high = _wilson(min(1.0, max(0.0, value - bias)), value * (1 - value) / variance if variance > TINY else whole)
    low, high = min(low, value), max(high, value)
    if metric == "macro_f1" and variance > TINY:
        high = min(1.0, value + math.hypot(high - value, _bound_unseen(confusions)))
    return _Measured(value, (low, high), influence_N)


def _bound_unseen(confusions: Sequence[Counts]) -> float:
    """How far classes without a right answer, whose F1 of 0 no prompt moves, could raise a macro F1.

    That is a share of its prompts that may be answered rightly although none of them was; of a class that no prompt asks for,
    any. Classes are put together as independent ones (Zou and Donner 2008).
    """
    asked = confusions[0].sum(1)
    is_unseen = sum(np.diagonal(confusion) for confusion in confusions) == 0
    return math.hypot(*map(bound_unseen_share, asked[is_unseen].tolist())) / len(asked)


def _leave_out(truth: Classes, guess: Classes, confusion: Counts, metric: Metric) -> Shares:
    """The metric without each prompt; prompts of one class and one predicted class are alike."""
    num_classes = len(confusion)
    asked, guessed, hits = confusion.sum(1), confusion.sum(0)[:num_classes], np.diagonal(confusion)
    cells, cell_N = np.unique(np.stack([truth, guess], 1), axis=0, return_inverse=True)
    is_of, is_guessed = cells[:, :1] == np.arange(num_classes), cells[:, 1:] == np.arange(num_classes)
    others = _rate(hits - (is_of & is_guessed), guessed - is_guessed, asked - is_of, metric)
    return others[cell_N.reshape(-1)]


def _wilson(share: float, size: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many prompts, which need not be whole."""
    if size <= 0:
        return 0.0, 1.0
    z = float(norm.isf(0.025))
    centre, scale = share + z**2 / (2 * size), 1 + z**2 / size
    spread = z * math.sqrt(max(0.0, share * (1 - share)) / size + z**2 / (4 * size**2))
    return max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale))


def _subtract(two: _Measured, one: _Measured) -> tuple[float, float]:
    """Interval of a difference from those of its parts and how the two move together (MOVER)."""
    norms = math.sqrt(float(one.influence_N @ one.influence_N) * float(two.influence_N @ two.influence_N))
    together = float(one.influence_N @ two.influence_N) / norms if norms > TINY else 0.0
    difference = two.value - one.value

    def reach(rise: float, fall: float) -> float:
        return math.sqrt(max(0.0, rise**2 + fall**2 - 2 * together * rise * fall))

    low = difference - reach(two.value - two.interval[0], one.interval[1] - one.value)
    return low, difference + reach(two.interval[1] - two.value, one.value - one.interval[0])


def count_confusion(truth: Classes, guess: Classes, num_classes: int) -> Counts:
    """Prompts by class and predicted class, the last column no label: (classes, classes + 1)."""
    column = np.where(guess == NONE, num_classes, guess)
    flat = np.bincount(truth * (num_classes + 1) + column, minlength=num_classes * (num_classes + 1))
    return flat.reshape(num_classes, num_classes + 1)


def compute_metric(confusion: Counts, metric: Metric) -> float:
    """A metric of a confusion table."""
    guessed = confusion.sum(0)[: len(confusion)]
    return float(_rate(np.diagonal(confusion), guessed, confusion.sum(1), metric))


def _rate(hits: Counts, guessed: Counts, asked: Counts, metric: Metric) -> Shares:
    """A metric of counts by class, the last axis."""
    if metric == "accuracy":
        return np.asarray(hits.sum(-1) / np.maximum(asked.sum(-1), 1))
    f1 = 2 * hits / np.maximum(asked + guessed, 1)
    return np.asarray(f1.mean(-1) if metric == "macro_f1" else (f1 * asked).sum(-1) / np.maximum(asked.sum(-1), 1))


def _check(gold: Sequence[int], predicted: Sequence[int]) -> tuple[Classes, Classes]:
    if len(gold) != len(predicted) or not len(gold):
        raise EvaluationError(f"{len(predicted)} predictions for {len(gold)} prompts of a test")
    return np.asarray(gold, dtype=np.int64), np.asarray(predicted, dtype=np.int64)


def _exchange(
    truth: Classes, one_SN: Classes, two_SN: Classes, num_classes: int, num_tests: int, rng: np.random.Generator
) -> dict[Metric, float]:
    """Share of exchanges of the two models' predictions, prompt by prompt, that differ as much; itself counted.

    Hits and guesses of a class are sums over prompts, so that those of many exchanges are one product of matrices.
    """
    asked = np.bincount(truth, minlength=num_classes)
    differ = np.flatnonzero((one_SN != two_SN).any(0))
    sides = [_count_all(truth, guess_SN, num_classes) for guess_SN in (one_SN, two_SN)]
    changes = [
        _indicate(truth[differ], two, num_classes) - _indicate(truth[differ], one, num_classes)
        for one, two in zip(one_SN[:, differ], two_SN[:, differ])
    ]
    found = {metric: _gap(sides[0][None], sides[1][None], asked, metric)[0] for metric in METRICS}
    as_large, drawn, wanted = dict.fromkeys(METRICS, 1), 0, max(EXCHANGES, PER_TEST * num_tests)
    chunk = min(EXCHANGES, max(1, CHUNK // max(1, len(differ) + 4 * num_classes * len(one_SN))))
    while drawn < wanted and (drawn < EXCHANGES or min(as_large.values()) <= ENOUGH):
        swapped = (rng.random((min(chunk, wanted - drawn), len(differ)), dtype=np.float32) < 0.5).astype(np.float32)
        moved = np.rint(np.stack([swapped @ change for change in changes], 1)).astype(np.int64)
        for metric in METRICS:
            gaps = _gap(sides[0] + moved, sides[1] - moved, asked, metric)
            as_large[metric] += int((np.abs(gaps) >= abs(found[metric]) - TINY).sum())
        drawn += len(swapped)
    return {metric: count / (drawn + 1) for metric, count in as_large.items()}


def _indicate(truth: Classes, guess: Classes, num_classes: int) -> NDArray[np.float32]:
    """Which class a prompt is a hit of, and which it is guessed as: (prompts, 2 x classes)."""
    guessed = (guess[:, None] == np.arange(num_classes)).astype(np.float32)
    return np.concatenate([guessed * (guess == truth)[:, None], guessed], 1)


def _count_all(truth: Classes, guess_SN: Classes, num_classes: int) -> Counts:
    """Hits and guesses of each class, for each seed: (seeds, 2 x classes)."""
    return np.stack([_indicate(truth, guess, num_classes).sum(0) for guess in guess_SN]).astype(np.int64)


def _gap(one: Counts, two: Counts, asked: Counts, metric: Metric) -> Shares:
    """The second's metric less the first's, mean over seeds, of counts (exchanges, seeds, 2 x classes)."""
    values = []
    for counts in (one, two):
        hits, guessed = np.split(counts, 2, axis=-1)
        values.append(_rate(hits, guessed, asked, metric).mean(-1))
    return values[1] - values[0]
