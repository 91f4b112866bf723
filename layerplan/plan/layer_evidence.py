"""Is what one number per layer says more than noise? One test for a set of top layers, one for a step.

Top layers. A measurement is taken several times: on rows of text, in steps, for kinds of matrices. Each repeat ranks the
layers. Were they all alike, every repeat would rank them in an order of its own, so under the null hypothesis the layers
of each repeat may be permuted, independently of the other repeats. The statistic is the mean rank of the k layers that
rank highest on average less that of the rest; the k layers are chosen anew after each permutation. This is Friedman's test
aimed at the k best, and its p says that repeats agree on which layers lead, not that training those layers helps.

A step. The layers' values say that the shallow or the deep side should train when their standardised difference of means,
largest over the boundaries, is larger than that of layers in other orders. Pairs of neighbours are moved together, since
neighbours resemble each other. Longer blocks, as two profiles are moved in (`layerplan.plan.permutation`), leave one
profile too few orders: a perfect step in 30 layers cut into 8 blocks has a p of 0.04 at best, and L shifts no better.
Where neighbours resemble each other over more than a pair the test is too bold; docs/measurements.md says how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from layerplan.plan.boundary import TIE, Array, step_down
from layerplan.plan.permutation import NUM_RESAMPLES, draw_orders

Side = Literal["deep", "shallow", "either"]
SEED = 20
AT_ONCE = NUM_RESAMPLES // 9
"""Permutations held in memory together."""
PAIR = 2
"""Neighbours that are moved together."""


@dataclass(frozen=True)
class TopTest:
    """How far repeats agree on the layers that lead."""

    p_value: float | None
    """Share of permutations that separate k layers as well; None without two repeats to compare."""
    agreement: float | None
    """Kendall's W over all layers: 1 when repeats rank them alike, 0 when they do not agree at all."""


@dataclass(frozen=True)
class Step:
    """The boundary at which one profile changes most."""

    boundary: int
    """Layers [0, boundary) are shallow."""
    freeze: Literal["deep", "shallow"]
    """The side with the lower mean."""
    rating: float
    """Difference of the means times sqrt(k (L - k)) / L."""
    p_value: float
    """Share of arrangements of the layers with a step as large."""


def rank_shares(repeats: Sequence[Sequence[float | None]] | ArrayLike) -> Array:
    """Each repeat's ranks of the layers as shares in (0, 1), largest value highest, ties averaged; NaN stays: (R, L)."""
    from scipy.stats import rankdata  # takes longer to load than a config to be refused

    values = np.array(repeats, dtype=np.float64)
    shares = np.full(values.shape, np.nan)
    for row, ranked in zip(values, shares):
        there = ~np.isnan(row)
        ranked[there] = (rankdata(row[there]) - 0.5) / max(1, there.sum())
    return shares


def rate_top(repeats: Sequence[Sequence[float | None]], k: int) -> TopTest:
    """Tests whether repeats agree on which k layers have the largest values.

    Args:
        repeats: (R, L), None where a layer has no value.
        k: Layers that are chosen, 1..L.

    Returns:
        p and agreement; both None with fewer than two repeats, p None when every layer is chosen.
    """
    if len(repeats) < 2:
        return TopTest(None, None)
    shares = rank_shares(repeats)
    num_layers = shares.shape[1]
    agreement = compute_agreement(shares)
    if k >= num_layers:
        return TopTest(None, agreement)
    observed = _separate(shares[None], k)[0] - TIE
    rng = np.random.default_rng([SEED, *shares.shape, k])
    counts = [
        (_separate(_permute_rows(shares, AT_ONCE, rng), k) >= observed).sum() for _ in range(NUM_RESAMPLES // AT_ONCE)
    ]
    return TopTest(float((1 + sum(counts)) / (1 + NUM_RESAMPLES)), agreement)


def compute_agreement(shares: Array) -> float:
    """Kendall's W of rank shares: variance of the layers' mean rank over that of one repeat, ties making it smaller."""
    mean = np.nanmean(shares, axis=0)
    single = np.mean([np.nanvar(np.arange(1, n + 1) / n) for n in (~np.isnan(shares)).sum(1)])
    return float(np.var(mean) / single) if single > 0 else 1.0


def find_step(values: ArrayLike, *, min_side: int, freeze: Side, higher_trains: bool = True) -> Step | None:
    """The boundary and side the values speak for, tested against layers in other orders.

    Args:
        values: One per layer, (L,).
        min_side: Fewest layers on either side.
        freeze: Which side may freeze.
        higher_trains: Whether the side with the larger mean trains.

    Returns:
        None when the model has too few layers for such sides.
    """
    profile = np.asarray(values, dtype=np.float64) * (1.0 if higher_trains else -1.0)
    num_layers = len(profile)
    candidates = range(min_side, num_layers - min_side + 1)
    if not candidates:
        return None
    contrasts = _make_contrasts(num_layers, candidates)
    rated = _keep_side(contrasts @ profile, freeze)
    orders = draw_orders(num_layers, num_layers, size=PAIR)
    best = _keep_side(contrasts @ profile[orders], freeze).max(0)
    chosen = int((rated >= rated.max() - TIE).argmax())
    trains_shallow = freeze == "deep" or (freeze == "either" and float((contrasts @ profile)[chosen]) >= 0)
    return Step(
        boundary=candidates[chosen],
        freeze="deep" if trains_shallow else "shallow",
        rating=float(rated[chosen]),
        p_value=float((1 + (best >= rated.max() - TIE).sum()) / (1 + NUM_RESAMPLES)),
    )


def _keep_side(steps: Array, freeze: Side) -> Array:
    """Steps as what may be chosen rates them: down for training the shallow side, up for the deep one, or both."""
    return np.abs(steps) if freeze == "either" else steps if freeze == "deep" else -steps


def _make_contrasts(num_layers: int, candidates: range) -> Array:
    """Row k weighs a profile so that the sum is its standardised step down at candidate k: (candidates, L)."""
    k = np.arange(1, num_layers)
    steps = step_down(np.eye(num_layers), num_layers - 1) * (np.sqrt(k * (num_layers - k)) / num_layers)
    return np.ascontiguousarray(steps[:, candidates.start - 1 : candidates.stop - 1].T)


def _separate(shares: Array, k: int) -> Array:
    """Mean rank of the k layers that rank highest on average less that of the rest: (N, R, L) to (N,)."""
    with np.errstate(invalid="ignore"):
        mean = np.sort(np.nanmean(shares, axis=1), axis=-1)
    return np.asarray(mean[:, -k:].mean(-1) - mean[:, :-k].mean(-1))


def _permute_rows(shares: Array, count: int, rng: np.random.Generator) -> Array:
    """Each repeat's ranks given to other layers, those without a rank staying without one: (R, L) to (count, R, L)."""
    drawn = np.repeat(shares[None], count, axis=0)
    for row, own in enumerate(shares):
        there = np.flatnonzero(~np.isnan(own))
        drawn[:, row, there] = rng.permuted(drawn[:, row, there], axis=-1)
    return drawn
