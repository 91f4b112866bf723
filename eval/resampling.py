"""Bootstrap over questions, and over seeds where a condition was trained more than once.

Seeds and questions are crossed: every seed answers the same questions. One draw of questions inside each subject
therefore serves all seeds, and seeds are drawn for themselves. S seeds drawn with replacement spread only
sqrt((S - 1) / S) as far as seeds do, which for the two to five seeds people have is far too little; their deviations are
scaled back, and tests weigh Student's quantiles of both sources (Cochran and Cox). In simulations with no true difference
4 to 6 % of such tests reject at 5 %, with 2, 3 or 5 seeds; plain percentiles rejected up to 21 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student

BOOTSTRAP_SAMPLES = 2000


def bootstrap_means(
    values_SN: np.ndarray,
    subjects: Sequence[str],
    *,
    seed: int,
    samples: int = BOOTSTRAP_SAMPLES,
    minus_SN: np.ndarray | None = None,
) -> np.ndarray:
    """Bootstrap distribution of the mean, or of the difference of two conditions' means on the same questions.

    Args:
        values_SN: Seeds by questions. With one seed this is the paired bootstrap stratified by subject.
        subjects: Subject of each question.
        seed: Seed of the resampling.
        samples: How often.
        minus_SN: The other condition, with seeds of its own.

    Returns:
        One mean per sample.
    """
    rng = np.random.default_rng(seed)
    arms = [(1.0, values_SN)] if minus_SN is None else [(1.0, values_SN), (-1.0, minus_SN)]
    weights = [sign * _draw_seed_weights(len(values), samples, rng) for sign, values in arms]
    groups = np.unique(np.asarray(subjects), return_inverse=True)[1]
    totals = np.zeros(samples)
    for group in range(groups.max() + 1):
        chosen = groups == group
        pooled = sum(weight @ values[:, chosen] for weight, (_, values) in zip(weights, arms))
        assert isinstance(pooled, np.ndarray)
        size = pooled.shape[1]
        totals += np.take_along_axis(pooled, rng.integers(0, size, size=(samples, size)), axis=1).sum(1)
    return totals / values_SN.shape[1]


def _draw_seed_weights(num_seeds: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Weight of each seed in each sample; their deviations from equal weights are scaled to be unbiased."""
    drawn = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=samples) / num_seeds
    scale = math.sqrt(num_seeds / (num_seeds - 1)) if num_seeds > 1 else 1.0
    return 1 / num_seeds + scale * (drawn - 1 / num_seeds)


@dataclass(frozen=True)
class PooledEstimate:
    """A mean over seeds and questions, with what is needed to test it; shares, not percent.

    Its critical value is Cochran and Cox's: Student's quantiles of the parts, weighted with their variances. With two
    seeds that differ it is near 12.7 standard errors, with seeds that do not it is near 2.
    """

    mean: float
    parts: tuple[tuple[float, int], ...]
    """(variance, degrees of freedom) of the seeds of each condition, and of the questions."""

    @property
    def standard_error(self) -> float:
        """Square root of the whole variance."""
        return math.sqrt(sum(variance for variance, _ in self.parts))

    def quantile(self, tail: float) -> float:
        """How many standard errors are exceeded with this probability."""
        total = sum(variance for variance, _ in self.parts)
        return sum(variance * float(student.isf(tail, degrees)) for variance, degrees in self.parts) / total

    def interval(self) -> tuple[float, float]:
        """95 % interval, in percent."""
        spread = self.quantile(0.025) * self.standard_error if self.standard_error else 0.0
        return 100 * (self.mean - spread), 100 * (self.mean + spread)

    def p_at_most(self, value: float) -> float:
        """One-sided p-value of a true mean at or below a value."""
        if self.standard_error == 0:
            return float(self.mean <= value)
        distance = (self.mean - value) / self.standard_error
        low, high = 1e-300, 1 - 1e-15
        if distance >= self.quantile(low):
            return low
        return (
            1.0 if distance <= self.quantile(high) else float(brentq(lambda p: self.quantile(p) - distance, low, high))
        )

    def p_different(self, value: float = 0.0) -> float:
        """Two-sided p-value of a true mean equal to a value."""
        mirrored = PooledEstimate(2 * value - self.mean, self.parts)
        return min(1.0, 2 * min(self.p_at_most(value), mirrored.p_at_most(value)))


def estimate_pooled(
    values_SN: np.ndarray, subjects: Sequence[str], *, seed: int, minus_SN: np.ndarray | None = None
) -> PooledEstimate:
    """Mean of a condition, or of a difference: seeds' variance from their means, the rest from the bootstrap."""
    arms = [values_SN] if minus_SN is None else [values_SN, minus_SN]
    mean = float(values_SN.mean() - (0.0 if minus_SN is None else minus_SN.mean()))
    whole = float(bootstrap_means(values_SN, subjects, seed=seed, minus_SN=minus_SN).var())
    between = [(float(arm.mean(1).var(ddof=1)) / len(arm), len(arm) - 1) for arm in arms if len(arm) > 1]
    rest = max(0.0, whole - sum(variance for variance, _ in between))
    return PooledEstimate(mean, (*between, (rest, max(1, values_SN.shape[1] - 1))))
