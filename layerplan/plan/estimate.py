"""A mean over questions, documents or rows, and over seeds where a condition was trained more than once; no resampling.

Units (questions, documents, rows) and seeds are crossed: every seed is asked the same units. The variance of a mean is
then that of the seeds' means over their number and that of the units' means over theirs, the analysis of variance of a
two-way random layout (Searle, Casella and McCulloch 1992). What one seed does on one unit is in both; taken off one of
them, as it is there, two seeds were told apart in up to 11 % where there was nothing to find, and left in both in 7 %.
Quantiles are Student's, weighted with both variances (Cochran and Cox): two seeds that differ need a very large difference.

Units may weigh differently: bits per byte are a mean over documents weighted with their bytes. Squared residuals are then
scaled so that their sum is unbiased when units vary alike, with as many degrees of freedom as its own variance implies
(Bell and McCaffrey 2002; Imbens and Kolesár 2016): few where a few documents hold most bytes. With equal weights that is
Student's paired t-test. Units drawn within strata vary within them; strata of one unit, which have no variance of their
own, are put together (Cochran 1977, collapsed strata).

`docs/evaluation_protocol.md` has how often each test rejects where there is nothing to find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit

Values = NDArray[np.float64]
ROUNDING = 1e-12
"""Units that differ by less than this share of the largest do not differ."""
LEAST = 1e-100
"""No p is said to be less; SciPy's quantile is minus infinity for 1e-300 and 3 or 5 to 12 degrees of freedom."""
MOST = 1 - 1e-15


@dataclass(frozen=True)
class PooledEstimate:
    """A mean over seeds and units, with what is needed to test it, in the unit of its values.

    Its critical value is Cochran and Cox's: Student's quantiles of the parts, weighted with their variances. With two
    seeds that differ it is near 12.7 standard errors, with seeds that do not it is near 2.
    """

    mean: float
    parts: tuple[tuple[float, float], ...]
    """(variance, degrees of freedom) of the seeds of each condition, and of the units; infinite where it is not known."""
    num_units: int = 1
    """Units behind it: where all are equal, a sign test of so many is all that can be said."""

    @property
    def standard_error(self) -> float:
        """Square root of the whole variance."""
        return math.sqrt(sum(variance for variance, _ in self.parts))

    def quantile(self, tail: float) -> float:
        """How many standard errors are exceeded with this probability."""
        total = sum(variance for variance, _ in self.parts)
        return sum(variance * -float(stdtrit(degrees, tail)) for variance, degrees in self.parts) / total

    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        if not math.isfinite(self.standard_error):
            return -math.inf, math.inf
        spread = self.quantile(0.025) * self.standard_error if self.standard_error else 0.0
        return self.mean - spread, self.mean + spread

    def p_at_most(self, value: float) -> float:
        """One-sided p-value of a true mean at or below a value."""
        if not math.isfinite(self.standard_error):
            return 0.5
        if self.standard_error == 0:
            return 1.0 if self.mean <= value else 0.5**self.num_units
        distance = (self.mean - value) / self.standard_error
        if len(self.parts) == 1:
            return max(LEAST, float(stdtr(self.parts[0][1], -distance)))
        if distance >= self.quantile(LEAST):
            return LEAST
        if distance <= self.quantile(MOST):
            return 1.0
        tail = brentq(lambda tail: self.quantile(math.exp(tail)) - distance, math.log(LEAST), math.log(MOST))
        return math.exp(tail)

    def p_different(self, value: float = 0.0) -> float:
        """Two-sided p-value of a true mean equal to a value."""
        mirrored = PooledEstimate(2 * value - self.mean, self.parts, self.num_units)
        return min(1.0, 2 * min(self.p_at_most(value), mirrored.p_at_most(value)))


@dataclass(frozen=True)
class SeedSpread:
    """How far the means of single seeds lie apart."""

    variance: float
    """Of one seed's mean."""
    degrees: int
    """Seeds it is measured from, less one per condition."""


def measure_seeds(conditions: Sequence[Values], weights_N: Values | None = None) -> SeedSpread | None:
    """The spread of seeds over conditions together, as if seeds moved all of them alike; None when each has one seed.

    Args:
        conditions: Seeds by units, (S, N) each.
        weights_N: Weight of each unit, any positive scale; equal when left out.
    """
    several = [values for values in conditions if len(values) > 1]
    if not several:
        return None
    share_N = _share(several[0].shape[1], weights_N)
    degrees = [len(values) - 1 for values in several]
    variances = [float((values @ share_N).var(ddof=1)) for values in several]
    return SeedSpread(float(np.average(variances, weights=degrees)), sum(degrees))


def estimate_pooled(
    values_SN: Values,
    *,
    strata: Sequence[str] | None = None,
    weights_N: Values | None = None,
    minus_SN: Values | None = None,
    spread: SeedSpread | None = None,
) -> PooledEstimate:
    """Mean of a condition over its seeds and units, or of the difference of two conditions on the same units.

    Args:
        values_SN: Seeds by units.
        strata: Stratum of each unit; all are of one when left out.
        weights_N: Weight of each unit, any positive scale; equal when left out.
        minus_SN: The other condition, with seeds of its own.
        spread: How far seeds lie apart, where it is known from more conditions than these; else it is measured from each
            condition's own seeds, and a condition of one seed is taken as it is: what another seed would change is not in
            the estimate.
    """
    conditions = [values_SN] if minus_SN is None else [values_SN, minus_SN]
    gap_N = values_SN.mean(0) - (0.0 if minus_SN is None else minus_SN.mean(0))
    share_N = _share(len(gap_N), weights_N)
    spreads = [(_choose_spread(spread, measure_seeds([values], weights_N)), len(values)) for values in conditions]
    seeds = [(found.variance / count, found.degrees) for found, count in spreads if found is not None]
    return PooledEstimate(
        float(share_N @ gap_N), (*seeds, _estimate_units(gap_N, share_N, strata)), num_units=len(gap_N)
    )


def _choose_spread(of_all: SeedSpread | None, own: SeedSpread | None) -> SeedSpread | None:
    """The wider one, with as many degrees of freedom as are known of all."""
    if of_all is None or own is None or own.variance <= of_all.variance:
        return of_all or own
    return SeedSpread(own.variance, of_all.degrees)


def _share(num_units: int, weights_N: Values | None) -> Values:
    return np.full(num_units, 1 / num_units) if weights_N is None else weights_N / weights_N.sum()


def _estimate_units(gap_N: Values, share_N: Values, strata: Sequence[str] | None) -> tuple[float, float]:
    """Variance of the weighted mean within strata, and its degrees of freedom; infinite and 1 for a single unit."""
    groups = [np.arange(len(gap_N))] if strata is None else _collapse(strata)
    variance, expected, spread = 0.0, 0.0, 0.0
    for group in groups:
        total = float(share_N[group].sum())
        found, size, degrees = _estimate_stratum(gap_N[group], share_N[group] / total)
        variance += total**2 * found
        expected += total**2 * size
        spread += (total**2 * size) ** 2 / degrees
    return variance, expected**2 / spread


def _estimate_stratum(gap_N: Values, share_N: Values) -> tuple[float, float, float]:
    """Variance of a weighted mean, the same per variance of one unit, and its degrees of freedom.

    The estimate is e' D e with residuals e = (I - 1 q') gap and q the shares. D makes its expectation exact when units
    vary alike; the degrees of freedom are Satterthwaite's, of M = (I - 1 q')' D (I - 1 q') = D - q d' - d q' + sum(d) q q'.
    """
    q = share_N
    qq = float(q @ q)
    if len(q) == 1 or q.max() > 1 - ROUNDING:
        return math.inf, qq, 1.0
    d = q**2 / (1 - 2 * q + qq)
    total, dd, qd = float(d.sum()), float(d @ d), float(q @ d)
    squared_norm = (
        dd
        - 4 * float(q @ d**2)
        + 2 * total * float(d @ q**2)
        + 2 * qq * dd
        + 2 * qd**2
        - 4 * total * qq * qd
        + (total * qq) ** 2
    )
    residuals = gap_N - q @ gap_N
    if np.abs(residuals).max() <= ROUNDING * np.abs(gap_N).max():
        return 0.0, qq, qq**2 / squared_norm
    return float(d @ residuals**2), qq, qq**2 / squared_norm


def _collapse(strata: Sequence[str]) -> list[NDArray[np.intp]]:
    """Places of each stratum's units; strata of one unit are one, or join another where there is but one of them."""
    names, inverse = np.unique(np.asarray(strata), return_inverse=True)
    groups = [np.flatnonzero(inverse == place) for place in range(len(names))]
    alone = [group for group in groups if len(group) == 1]
    kept = [group for group in groups if len(group) > 1]
    if not alone:
        return kept
    together = np.concatenate(alone)
    if len(alone) == 1 and kept:
        return [np.concatenate([kept[0], together]), *kept[1:]]
    return [*kept, together]
