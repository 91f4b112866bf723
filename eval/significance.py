"""What a difference between scores is worth: intervals, tests against guessing, paired tests, one sentence each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import Field
from scipy.stats import binomtest

from eval.scoring import Answer, EvaluationResult
from layerplan.config.base import StrictModel
from layerplan.errors import EvaluationError
from layerplan.intervals import show_difference
from layerplan.plan.estimate import PooledEstimate, estimate_pooled
from layerplan.plan.holm import correct_holm

CHANCE = 0.25
ALPHA = 0.05
NO_WIDTH = 1e-9
"""Points; an interval narrower than rounding."""

Arm = tuple[str, EvaluationResult, Sequence[Answer]]
"""A name, its scores, and its answers in the benchmark's order."""

Comparison = tuple[Sequence[Arm], Sequence[Arm]]
"""What is compared with, and what is compared with it: each one run, or several seeds of one condition."""


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
    num_seeds: int = Field(default=1, ge=1)
    """Runs of the judged condition pooled into this verdict."""
    num_reference_seeds: int = Field(default=1, ge=1)
    """Runs of the reference condition."""
    num_unparsed: int = Field(ge=0)
    """Outputs of the run, over all its seeds, that no answer could be read from; they count as wrong."""
    accuracy: float
    """Question-weighted accuracy of the run, percent."""
    accuracy_interval: tuple[float, float]
    """95 % interval, percent: Wilson's for one run, over seeds and questions for several seeds."""
    reference_accuracy: float
    """The reference's accuracy, percent."""
    reference_interval: tuple[float, float]
    """The same of the reference, percent."""
    difference: float
    """Accuracy minus reference, points."""
    difference_interval: tuple[float, float]
    """95 % paired interval over questions within subjects (and over seeds), points."""
    test: str = "exact McNemar"
    """Which test gave the p-value."""
    p_value: float
    """Two-sided p-value of no difference."""
    adjusted_p: float
    """The same after Holm's correction over all comparisons made together."""
    chance_p: float
    """That the run does no better than 25 %: exact binomial for one run, over seeds and questions for several.

    Holm-corrected over the runs, benchmarks and protocols judged together.
    """
    constant_letter_p: float
    """The same against always answering the best single letter, corrected for itself."""
    sentence: str
    """The verdict in words."""


def compute_wilson(correct: int, asked: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, in percent."""
    interval = binomtest(correct, asked).proportion_ci(method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def compute_mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value from the discordant counts; 1 when there are none."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def judge_comparisons(comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Judges comparisons over several benchmarks and protocols, corrected over all of them together.

    Raises:
        EvaluationError: When the protocol ids of a comparison differ.
    """
    drafts = [_compare(references, runs) for references, runs in comparisons]
    adjusted = correct_holm([draft.p_value for draft in drafts])
    chance = _correct_levels(drafts, [draft.chance_p for draft in drafts])
    letter = _correct_levels(drafts, [draft.constant_letter_p for draft in drafts])
    corrected = [
        draft.model_copy(update={"adjusted_p": p, "chance_p": by_chance, "constant_letter_p": by_letter})
        for draft, p, by_chance, by_letter in zip(drafts, adjusted, chance, letter)
    ]
    return [verdict.model_copy(update={"sentence": _describe(verdict)}) for verdict in corrected]


def _correct_levels(verdicts: Sequence[Verdict], p_values: Sequence[float]) -> list[float]:
    """Holm's correction over what was judged, each once however often it is compared."""
    keys = [
        (verdict.benchmark, verdict.protocol, verdict.run, verdict.accuracy, p)
        for verdict, p in zip(verdicts, p_values)
    ]
    judged = list(dict.fromkeys(keys))
    adjusted = dict(zip(judged, correct_holm([key[-1] for key in judged])))
    return [adjusted[key] for key in keys]


def _compare(references: Sequence[Arm], runs: Sequence[Arm]) -> Verdict:
    """A verdict whose p is not corrected yet and that has no sentence."""
    reference_name, base, base_answers = references[0]
    for name, result, answers in [*references[1:], *runs]:
        _check_comparable(reference_name, base, base_answers, name, result, answers)
    theirs_SN, mine_SN = _collect(references), _collect(runs)
    subjects = [answer.id.partition("/")[0] for answer in base_answers]
    keys = Counter(answer.answer for answer in base_answers)
    interval, test, p_value = _test_difference(mine_SN, theirs_SN, subjects)
    chance_p, constant_letter_p = _test_levels(runs, mine_SN, subjects, max(keys.values()) / len(base_answers))
    return Verdict(
        benchmark=base.benchmark,
        protocol=base.protocol,
        run=runs[0][0],
        reference=reference_name,
        num_questions=base.num_asked,
        num_seeds=len(runs),
        num_reference_seeds=len(references),
        num_unparsed=sum(item.num_unparsed for _, item, _ in runs),
        accuracy=100 * float(mine_SN.mean()),
        accuracy_interval=_describe_accuracy(runs, mine_SN, subjects),
        reference_accuracy=100 * float(theirs_SN.mean()),
        reference_interval=_describe_accuracy(references, theirs_SN, subjects),
        difference=100 * float(mine_SN.mean() - theirs_SN.mean()),
        difference_interval=interval,
        test=test,
        p_value=p_value,
        adjusted_p=p_value,
        chance_p=chance_p,
        constant_letter_p=constant_letter_p,
        sentence="",
    )


def _test_difference(
    mine_SN: np.ndarray, theirs_SN: np.ndarray, subjects: Sequence[str]
) -> tuple[tuple[float, float], str, float]:
    """95 % interval in points, the test's name, and its two-sided p."""
    pair = (mine_SN - theirs_SN, None) if len(theirs_SN) == 1 else (mine_SN, theirs_SN)
    gap = estimate_pooled(pair[0], strata=subjects, minus_SN=pair[1])
    interval = _to_percent(gap, at_least=-100)
    if len(mine_SN) == len(theirs_SN) == 1:
        mine, theirs = mine_SN[0], theirs_SN[0]
        if (mine == theirs).all() or interval[1] - interval[0] < NO_WIDTH:
            interval = _bound_unseen(mine - theirs)
        return interval, "exact McNemar", compute_mcnemar(int((mine > theirs).sum()), int((theirs > mine).sum()))
    return interval, "seeds and questions, Cochran-Cox", gap.p_different()


def bound_unseen_share(count: int) -> float:
    """How large a share may be of which none is seen among so many, in 2.5 % of tests (Clopper and Pearson 1934); 1 of none."""
    return 1 - 0.025 ** (1 / count) if count else 1.0


def _bound_unseen(gap_N: np.ndarray) -> tuple[float, float]:
    """The interval in points where no question differs from another of its subject, so that there is no spread to estimate.

    It is what a share that was seen in none of n questions may be at most, and how far it could move the difference.
    """
    most, gap = bound_unseen_share(len(gap_N)), gap_N.mean()
    low, high = gap - most * (gap_N.max() + 1), gap + most * (1 - gap_N.min())
    return max(-100.0, 100 * float(low)), min(100.0, 100 * float(high))


def _to_percent(estimate: PooledEstimate, *, at_least: float) -> tuple[float, float]:
    """Its 95 % interval in percent or points, no further than scores reach."""
    low, high = estimate.interval()
    return max(at_least, 100 * low), min(100.0, 100 * high)


def _test_levels(
    runs: Sequence[Arm], mine_SN: np.ndarray, subjects: Sequence[str], best_letter_share: float
) -> tuple[float, float]:
    """P against guessing, and against the best single letter."""
    if len(runs) == 1:
        result = runs[0][1]
        return _test_better(result, CHANCE), _test_better(result, best_letter_share)
    level = estimate_pooled(mine_SN, strata=subjects)
    return level.p_at_most(CHANCE), level.p_at_most(best_letter_share)


def _collect(arms: Sequence[Arm]) -> np.ndarray:
    """Whether each answer is right, seeds by questions."""
    return np.array([[answer.is_correct for answer in answers] for _, _, answers in arms], dtype=float)


def _describe_accuracy(arms: Sequence[Arm], values_SN: np.ndarray, subjects: Sequence[str]) -> tuple[float, float]:
    if len(arms) == 1:
        return compute_wilson(arms[0][1].num_correct, arms[0][1].num_asked)
    return _to_percent(estimate_pooled(values_SN, strata=subjects), at_least=0)


def _check_comparable(
    reference_name: str,
    base: EvaluationResult,
    base_answers: Sequence[Answer],
    name: str,
    result: EvaluationResult,
    answers: Sequence[Answer],
) -> None:
    if base.protocol_id != result.protocol_id:
        raise EvaluationError(
            f"{name} and {reference_name}: protocol ids {result.protocol_id[:12]} and {base.protocol_id[:12]} differ;"
            " scores of different questions or prompts cannot be compared"
        )
    if [answer.id for answer in base_answers] != [answer.id for answer in answers]:
        raise EvaluationError(f"{name} and {reference_name}: their per-question files do not hold the same questions")


def _test_better(result: EvaluationResult, share: float) -> float:
    return float(binomtest(result.num_correct, result.num_asked, min(share, 1.0), alternative="greater").pvalue)


def _describe(verdict: Verdict) -> str:
    p = verdict.adjusted_p
    gap = show_difference(verdict.difference, verdict.difference_interval, 1) + " points"
    reference = f"{verdict.reference}{_count_seeds(verdict.num_reference_seeds)}"
    if p < ALPHA:
        direction = "better" if verdict.difference > 0 else "worse"
        text = f"{direction} than {reference} ({gap}, p = {p:.3g})"
    else:
        text = f"not distinguishable from {reference} ({gap}, p = {p:.3g})"
    if verdict.chance_p >= ALPHA:
        text += "; no better than guessing"
    elif verdict.constant_letter_p >= ALPHA:
        text += "; not better than always answering one letter"
    if verdict.num_unparsed:
        text += f"; {verdict.num_unparsed} of {verdict.num_questions * verdict.num_seeds} outputs hold no answer"
    return f"{verdict.run}{_count_seeds(verdict.num_seeds)} is {text}."


def _count_seeds(count: int) -> str:
    return f" ({count} seeds)" if count != 1 else ""
