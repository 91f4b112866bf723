"""What a difference between scores is worth: intervals, tests against guessing, paired tests, one sentence each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field
from scipy.stats import binom, binomtest

from eval.scoring import Answer, EvaluationResult
from layerplan.config.base import StrictModel
from layerplan.errors import EvaluationError

CHANCE = 0.25
ALPHA = 0.05
BOOTSTRAP_SAMPLES = 2000


Arm = tuple[str, EvaluationResult, Sequence[Answer]]
"""A name, its scores, and its answers in the benchmark's order."""


class Verdict(StrictModel):
    """One run against the untouched base, on one benchmark under one protocol."""

    benchmark: str
    """Benchmark name."""
    protocol: str
    """Protocol name."""
    run: str
    """The run that was judged."""
    reference: str
    """What it was compared with."""
    num_questions: int = Field(ge=1)
    """Questions both were asked."""
    num_unparsed: int = Field(ge=0)
    """Outputs of the run that no answer could be read from; they count as wrong."""
    accuracy: float
    """Question-weighted accuracy of the run, percent."""
    accuracy_interval: tuple[float, float]
    """95 % Wilson interval, percent."""
    reference_accuracy: float
    """The reference's accuracy, percent."""
    reference_interval: tuple[float, float]
    """95 % Wilson interval of the reference, percent."""
    difference: float
    """Accuracy minus reference, points."""
    difference_interval: tuple[float, float]
    """95 % paired bootstrap interval, stratified by subject, points."""
    mcnemar_p: float
    """Exact McNemar test."""
    adjusted_p: float
    """The same after Holm's correction over all comparisons made together."""
    chance_p: float
    """Exact binomial test that the run does better than 25 %."""
    constant_letter_p: float
    """The same against always answering the best single letter."""
    sentence: str
    """The verdict in words."""


def compute_wilson(correct: int, asked: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percent."""
    z = 1.959963984540054
    share = correct / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return 100 * max(0.0, (centre - spread) / scale), 100 * min(1.0, (centre + spread) / scale)


def compute_mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value from the discordant counts; 1 when there are none."""
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    return float(min(1.0, 2 * binom.cdf(min(only_first, only_second), discordant, 0.5)))


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that may be compared with alpha as they are."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def compare_runs(reference: Arm, runs: Sequence[Arm], *, seed: int = 0) -> list[Verdict]:
    """Judges runs against one reference under one protocol; corrects for the number of comparisons.

    Raises:
        EvaluationError: When protocol ids differ.
    """
    return judge_pairs([(reference, run) for run in runs], seed=seed)


def judge_pairs(pairs: Sequence[tuple[Arm, Arm]], *, seed: int = 0) -> list[Verdict]:
    """Judges (reference, run) pairs over several benchmarks and protocols, corrected over all of them together.

    Raises:
        EvaluationError: When the protocol ids of a pair differ.
    """
    drafts = [_compare(reference, run, seed) for reference, run in pairs]
    adjusted = correct_holm([float(str(draft["mcnemar_p"])) for draft in drafts])
    return [
        Verdict.model_validate({**draft, "adjusted_p": p, "sentence": _describe({**draft, "adjusted_p": p})})
        for draft, p in zip(drafts, adjusted)
    ]


def _compare(reference: Arm, run: Arm, seed: int) -> dict[str, object]:
    (reference_name, base, base_answers), (name, result, answers) = reference, run
    if base.protocol_id != result.protocol_id:
        raise EvaluationError(
            f"{name} and {reference_name}: protocol ids {result.protocol_id[:12]} and {base.protocol_id[:12]} differ;"
            " scores of different questions or prompts cannot be compared"
        )
    mine = np.array([answer.is_correct for answer in answers], dtype=float)
    theirs = np.array([answer.is_correct for answer in base_answers], dtype=float)
    only_mine, only_theirs = int((mine > theirs).sum()), int((theirs > mine).sum())
    keys = Counter(answer.answer for answer in answers)
    best_letter_share = max(keys.values()) / len(answers)
    subjects = [answer.id.partition("/")[0] for answer in answers]
    return {
        "benchmark": result.benchmark,
        "protocol": result.protocol,
        "run": name,
        "reference": reference_name,
        "num_questions": result.num_asked,
        "num_unparsed": result.num_unparsed,
        "accuracy": result.question_mean,
        "accuracy_interval": compute_wilson(result.num_correct, result.num_asked),
        "reference_accuracy": base.question_mean,
        "reference_interval": compute_wilson(base.num_correct, base.num_asked),
        "difference": result.question_mean - base.question_mean,
        "difference_interval": bootstrap_difference(mine - theirs, subjects, seed=seed),
        "mcnemar_p": compute_mcnemar(only_mine, only_theirs),
        "chance_p": _test_better(result, CHANCE),
        "constant_letter_p": _test_better(result, best_letter_share),
    }


def bootstrap_difference(
    differences: np.ndarray, subjects: Sequence[str], *, seed: int, samples: int = BOOTSTRAP_SAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean paired difference, resampled within subjects, in points."""
    rng = np.random.default_rng(seed)
    groups = np.unique(np.asarray(subjects), return_inverse=True)[1]
    totals = np.zeros(samples)
    for group in range(groups.max() + 1):
        values = differences[groups == group]
        totals += values[rng.integers(0, len(values), size=(samples, len(values)))].sum(1)
    low, high = np.quantile(100 * totals / len(differences), [0.025, 0.975])
    return float(low), float(high)


def _test_better(result: EvaluationResult, share: float) -> float:
    return float(binomtest(result.num_correct, result.num_asked, min(share, 1.0), alternative="greater").pvalue)


def _describe(values: Mapping[str, object]) -> str:
    difference, p = float(str(values["difference"])), float(str(values["adjusted_p"]))
    low, high = values["difference_interval"]  # type: ignore[misc]
    spread = (float(high) - float(low)) / 2  # type: ignore[has-type]
    if p < ALPHA:
        direction = "better" if difference > 0 else "worse"
        text = f"{direction} than {values['reference']} by {abs(difference):.1f} ± {spread:.1f} points (p = {p:.3g})"
    else:
        text = f"not distinguishable from {values['reference']} ({difference:+.1f} ± {spread:.1f} points, p = {p:.3g})"
    if float(str(values["chance_p"])) >= ALPHA:
        text += "; no better than guessing"
    elif float(str(values["constant_letter_p"])) >= ALPHA:
        text += "; not better than always answering one letter"
    if values["num_unparsed"]:
        text += f"; {values['num_unparsed']} of {values['num_questions']} outputs hold no answer"
    return f"{values['run']} is {text}."
