"""Scores of next-token classification: accuracy, macro and weighted F1, their intervals, and paired tests.

A prediction is the model's most likely next token over its whole vocabulary; one that is no label is wrong for its class
and right for none. F1 is per class, 2 TP / (2 TP + FP + FN), and 0 for a class with none of them; macro is the plain mean
over the classes (the paper's: 0.399 is a test of MRPC answered with its larger class), weighted counts each by its prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from eval.significance import compute_mcnemar, compute_wilson
from layerplan.config.base import StrictModel
from layerplan.errors import EvaluationError

SAMPLES = 2000
"""Resamples behind an interval, and exchanges behind a test."""
Metric = Literal["accuracy", "macro_f1", "weighted_f1"]
METRICS: tuple[Metric, ...] = ("accuracy", "macro_f1", "weighted_f1")
NONE = -1
"""Class of a prediction that is no label."""
Classes = NDArray[np.int64]


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
    """Wilson's for the accuracy, of a bootstrap over prompts for the others."""

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
    """95 %, of a bootstrap over prompts that both answered."""
    p_value: float = Field(ge=0, le=1)
    """Two-sided: exact McNemar for the accuracy of single runs, else exchanged predictions."""


def score_labels(
    gold: Sequence[int], predicted: Sequence[int], classes: Sequence[str], *, task: str, task_sha256: str, seed: int = 0
) -> LabelScores:
    """Scores predictions.

    Args:
        gold: Index of each prompt's class.
        predicted: Index of the predicted class, or `NONE`.
        classes: Names of the classes.
        task: Name of the task.
        task_sha256: Its hash.
        seed: Of the bootstrap.

    Raises:
        EvaluationError: When there are not as many predictions as prompts.
    """
    truth, guess = _check(gold, predicted)
    num_classes = len(classes)
    counts = count_confusion(truth, guess, num_classes)
    values = {metric: compute_metric(counts, metric) for metric in METRICS}
    rng = np.random.default_rng(seed)
    drawn = [_draw(rng, len(truth)) for _ in range(SAMPLES)]
    confusions = [count_confusion(truth[rows], guess[rows], num_classes) for rows in drawn]
    intervals = {metric: _interval([compute_metric(each, metric) for each in confusions]) for metric in METRICS[1:]}
    low, high = compute_wilson(int((truth == guess).sum()), len(truth))
    return LabelScores(
        task=task,
        task_sha256=task_sha256,
        classes=tuple(classes),
        num_asked=len(truth),
        num_no_label=int((guess == NONE).sum()),
        confusion=tuple(map(tuple, counts.tolist())),
        intervals={"accuracy": (low / 100, high / 100), **intervals},
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
    seed: int = 0,
) -> dict[Metric, LabelVerdict]:
    """The same of two methods, each trained with several seeds: a metric is the mean over a method's seeds.

    Prompts are drawn and exchanged with the predictions of all seeds on them, so that seeds count as no more prompts than
    there are. The verdict is about these seeds; it says nothing of others.

    Raises:
        EvaluationError: When there are not as many predictions as prompts, or not as many seeds of both methods.
    """
    if len(first) != len(second) or not first:
        raise EvaluationError(f"{len(second)} seeds compared with {len(first)}; as many of both methods are needed")
    truth = _check(gold, first[0])[0]
    one, two = (np.stack([_check(gold, predicted)[1] for predicted in arm]) for arm in (first, second))
    return {metric: _compare(truth, one, two, num_classes, metric, seed) for metric in METRICS}


def _compare(
    truth: Classes, one_SN: Classes, two_SN: Classes, num_classes: int, metric: Metric, seed: int
) -> LabelVerdict:
    def differ(truth: Classes, one_SN: Classes, two_SN: Classes) -> float:
        means = [
            np.mean([compute_metric(count_confusion(truth, guess, num_classes), metric) for guess in arm])
            for arm in (two_SN, one_SN)
        ]
        return float(means[0] - means[1])

    rng = np.random.default_rng(seed)
    drawn = (_draw(rng, len(truth)) for _ in range(SAMPLES))
    interval = _interval([differ(truth[rows], one_SN[:, rows], two_SN[:, rows]) for rows in drawn])
    found = differ(truth, one_SN, two_SN)
    if metric == "accuracy" and len(one_SN) == 1:
        right = one_SN[0] == truth, two_SN[0] == truth
        p_value = compute_mcnemar(int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
    else:
        p_value = _exchange(truth, one_SN, two_SN, differ, found, rng)
    return LabelVerdict(metric=metric, difference=found, interval=interval, p_value=p_value)


def count_confusion(truth: Classes, guess: Classes, num_classes: int) -> NDArray[np.int64]:
    """Prompts by class and predicted class, the last column no label: (classes, classes + 1)."""
    column = np.where(guess == NONE, num_classes, guess)
    flat = np.bincount(truth * (num_classes + 1) + column, minlength=num_classes * (num_classes + 1))
    return flat.reshape(num_classes, num_classes + 1)


def compute_metric(confusion: NDArray[np.int64], metric: Metric) -> float:
    """A metric of a confusion table."""
    hits, asked = np.diagonal(confusion), confusion.sum(1)
    if metric == "accuracy":
        return float(hits.sum() / asked.sum())
    guessed = confusion.sum(0)[: len(confusion)]
    f1 = 2 * hits / np.maximum(asked + guessed, 1)
    return float(f1.mean()) if metric == "macro_f1" else float((f1 * asked).sum() / asked.sum())


def _check(gold: Sequence[int], predicted: Sequence[int]) -> tuple[Classes, Classes]:
    if len(gold) != len(predicted) or not len(gold):
        raise EvaluationError(f"{len(predicted)} predictions for {len(gold)} prompts of a test")
    return np.asarray(gold, dtype=np.int64), np.asarray(predicted, dtype=np.int64)


def _draw(rng: np.random.Generator, size: int) -> Classes:
    return rng.integers(0, size, size=size)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _exchange(
    truth: Classes,
    one_SN: Classes,
    two_SN: Classes,
    difference: Callable[[Classes, Classes, Classes], float],
    found: float,
    rng: np.random.Generator,
) -> float:
    """Share of exchanges of the two models' predictions, prompt by prompt, that differ as much; itself counted."""
    as_large = 1
    for _ in range(SAMPLES):
        swapped = rng.random(len(truth)) < 0.5
        other = difference(truth, np.where(swapped, two_SN, one_SN), np.where(swapped, one_SN, two_SN))
        as_large += abs(other) >= abs(found) - 1e-12
    return as_large / (SAMPLES + 1)
