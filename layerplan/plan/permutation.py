"""Is a boundary more than noise, and where may it lie? Two permutation tests over layers, and a range of boundaries.

Resampling probes cannot tell: with enough of them noise between layers is measured exactly, and something is always
highest. The null hypothesis here is about layers: the two profiles have nothing to do with each other's order. Under it
the profiles may be moved along the layers independently of each other, and the best rating of the moved profiles is as
good as that of the measured ones. Neighbouring layers resemble each other, so they are moved together:

- shifted circularly: every pair of shifts, L (L - 1) of them, the measured pair included;
- cut into blocks of `block_size` layers, the blocks in random order.

Either may be too bold: shifts when a model has few layers, blocks when neighbours resemble each other over more layers
than a block holds. The larger p counts. Shifting both profiles together would have only L values, and little power.

A small p says that shallow and deep layers differ, not where: a steady trend differs too. Where is answered by weighting
the layers at random (exponential weights, one for each block, the blocks' start drawn as well) and choosing again: a step
keeps its place under any weights, the middle of a trend moves with them. 1 % of the choices lie outside the range on
either side, so that it holds the true boundary of planted steps of 1.5 standard deviations in 93 to 95 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from layerplan.config.plan import BoundaryRule
from layerplan.plan.boundary import (
    TIE,
    Array,
    check_profiles,
    list_candidates,
    normalize_min_max,
    step_down,
    weigh_boundaries,
)

SIGNIFICANT = 0.05
"""A boundary with a smaller p is called supported."""
NUM_RESAMPLES = 999
SEED = 16
"""Fixed, so that p is a function of the profile."""
SMALL_MODEL = 16
"""Layers below which blocks are of 2 layers in place of 4."""
TAIL = 0.01
"""Share of choices outside the range, on either side."""


@dataclass(frozen=True)
class LayerTest:
    """Outcome of the two tests; their p counts arrangements of the layers that score at least as high."""

    shift_p: float
    block_p: float

    @property
    def p_value(self) -> float:
        """The larger of the two."""
        return max(self.shift_p, self.block_p)


def compare_with_other_orders(
    task_particle: ArrayLike, layer_sensitivity: ArrayLike, rule: BoundaryRule, min_side: int
) -> LayerTest:
    """Tests the best rating of a profile against that of its layers in other orders.

    Args:
        task_particle: Ratio(l), L values.
        layer_sensitivity: LS(l), L - 1 values.
        rule: Form of S(k) that is rated.
        min_side: Fewest layers on either side, under `change_point`.

    Returns:
        Both p; 1 when the rule has no boundary to choose from.

    Raises:
        PlanError: When the lengths do not fit or a value is not finite.
    """
    particle, sensitivity = map(normalize_min_max, check_profiles(task_particle, layer_sensitivity))
    num_layers = len(particle)
    if not list_candidates(num_layers, rule, min_side):
        return LayerTest(1.0, 1.0)

    # (candidates, arrangements): what each profile adds to the rating of the candidates
    contrasts = [_make_contrasts(len(values), num_layers, rule, min_side) for values in (sensitivity, particle)]
    observed = (contrasts[0] @ sensitivity - contrasts[1] @ particle).max() - TIE
    high, low = (
        contrasts[0] @ sensitivity[_list_shifts(num_layers - 1)],
        contrasts[1] @ particle[_list_shifts(num_layers)],
    )
    shifted = np.full((high.shape[1], low.shape[1]), -np.inf)
    for one, other in zip(high, low):
        np.maximum(shifted, one[:, None] - other, out=shifted)
    orders = [draw_orders(len(values), num_layers) for values in (sensitivity, particle)]
    mixed = (contrasts[0] @ sensitivity[orders[0]] - contrasts[1] @ particle[orders[1]]).max(0)
    return LayerTest(
        shift_p=float((shifted >= observed).mean()),
        block_p=float((1 + (mixed >= observed).sum()) / (1 + NUM_RESAMPLES)),
    )


def find_boundary_range(
    task_particle: ArrayLike, layer_sensitivity: ArrayLike, rule: BoundaryRule, min_side: int
) -> tuple[int, int] | None:
    """Lowest and highest boundary, both inclusive, chosen when layers are weighted at random; None without candidates.

    Arguments and errors as in `compare_with_other_orders`.
    """
    particle, sensitivity = map(normalize_min_max, check_profiles(task_particle, layer_sensitivity))
    num_layers = len(particle)
    candidates = list_candidates(num_layers, rule, min_side)
    if not candidates:
        return None
    weights = _draw_weights(num_layers)
    count = num_layers - 2
    scores = step_down(sensitivity, count, weights[:, :-1]) - step_down(particle, count, weights)
    if rule == "change_point":
        share = (np.cumsum(weights, -1) / weights.sum(-1, keepdims=True))[:, :count]
        scores = scores * np.sqrt(share * (1 - share))
    rated = scores[:, candidates.start - 1 : candidates.stop - 1]
    chosen = candidates.start + (rated >= rated.max(-1, keepdims=True) - TIE).argmax(-1)
    low, high = np.quantile(chosen, [TAIL, 1 - TAIL], method="inverted_cdf")
    return int(low), int(high)


@lru_cache(maxsize=8)
def _make_contrasts(length: int, num_layers: int, rule: BoundaryRule, min_side: int) -> Array:
    """Row k weighs a profile so that the sum is its share of the rating of candidate k: (candidates, length)."""
    candidates = list_candidates(num_layers, rule, min_side)
    steps = step_down(np.eye(length), num_layers - 2) * weigh_boundaries(num_layers, rule)
    return np.ascontiguousarray(steps[:, candidates.start - 1 : candidates.stop - 1].T)


def _block_size(num_layers: int) -> int:
    return 4 if num_layers >= SMALL_MODEL else 2


@lru_cache(maxsize=8)
def _list_shifts(length: int) -> NDArray[Any]:
    """Column s holds the indices of a profile shifted by s: (length, length)."""
    index = np.arange(length)
    return (index[:, None] + index) % length


@lru_cache(maxsize=8)
def draw_orders(length: int, num_layers: int, size: int | None = None) -> NDArray[Any]:
    """Indices of a profile whose blocks stand in random order; the last block may be shorter: (length, resamples).

    Args:
        length: Values of the profile.
        num_layers: Layers of the model, which decide the draw.
        size: Layers of a block; the model's own size when left out.
    """
    rng = np.random.default_rng([SEED, length, num_layers])
    size = size or _block_size(num_layers)
    blocks = [np.arange(start, min(start + size, length)) for start in range(0, length, size)]
    return np.stack(
        [np.concatenate([blocks[i] for i in rng.permutation(len(blocks))]) for _ in range(NUM_RESAMPLES)], axis=1
    )


@lru_cache(maxsize=8)
def _draw_weights(num_layers: int) -> Array:
    """Positive weights of the layers, equal within blocks that start anywhere: (resamples, L)."""
    rng = np.random.default_rng([SEED, num_layers])
    size = _block_size(num_layers)
    blocks = rng.exponential(size=(NUM_RESAMPLES, num_layers // size + 2))
    starts = rng.integers(size, size=NUM_RESAMPLES)
    return np.stack([np.repeat(row, size)[start : start + num_layers] for row, start in zip(blocks, starts)])
