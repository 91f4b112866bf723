"""Would another choice of the analyst have given another answer? Variants of the measurement beside the measurement.

Three checks: another support of the divergence (top-50 for top-10), another mask (mean for zero), and half of the
probes against the other half. Each reports rank correlations of the profiles and what becomes of the boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from layerplan.config.plan import DEFAULT_MIN_SIDE
from layerplan.plan.boundary import compute_alignment_scores, find_best_boundary, list_candidates

Array = NDArray[np.float64]
NUM_SPLITS = 100
"""Random halvings of the probes; one alone would be a matter of luck."""


def check_stability(
    ratio: Array, sensitivity: Array, variants: Mapping[str, Array], group_of: NDArray[Any], *, seed: int
) -> dict[str, dict[str, float]]:
    """Compares the measurement with its variants and its halves.

    Args:
        ratio: Ratio(l) per probe, (N, L).
        sensitivity: LS(l) per probe, (N, L - 1).
        variants: LS(l) per probe under another option, by name; each is compared with the measurement on the probes
            it was made for, the others being NaN.
        group_of: Group of each probe, (N,).
        seed: Of the halvings.

    Returns:
        Per variant `num_probes`, `sensitivity_correlation`, `score_correlation` (Spearman), `boundary` and
        `boundary_change` in layers against the measurement on the same probes, both boundaries by the `change_point` rule
        and left out for models too small for it. For `halves` the means over the splits
        of `sensitivity_correlation`, `task_particle_correlation`, `score_correlation` and `boundary_change`, and
        `same_boundary_share`. Without two probes in some group there is no `halves`.
    """
    checks: dict[str, dict[str, float]] = {}
    for name, variant in variants.items():
        chosen = np.flatnonzero(~np.isnan(variant).any(axis=1))
        if len(chosen) == 0:
            continue
        whole = _summarise(ratio, sensitivity, group_of, chosen)
        other = _summarise(ratio, variant, group_of, chosen)
        checks[name] = {
            "num_probes": float(len(chosen)),
            "sensitivity_correlation": correlate(whole[1], other[1]),
            "score_correlation": correlate(whole[2], other[2]),
            **_compare_boundaries(whole[3], other[3]),
        }
    splits = [_split(group_of, np.random.default_rng([seed, number])) for number in range(NUM_SPLITS)]
    pairs = [
        tuple(_summarise(ratio, sensitivity, group_of, half) for half in halves)
        for halves in splits
        if all(len(half) for half in halves)
    ]
    if pairs:
        checks["halves"] = {
            "sensitivity_correlation": float(np.mean([correlate(a[1], b[1]) for a, b in pairs])),
            "task_particle_correlation": float(np.mean([correlate(a[0], b[0]) for a, b in pairs])),
            "score_correlation": float(np.mean([correlate(a[2], b[2]) for a, b in pairs])),
        }
        chosen_pairs = [(a[3], b[3]) for a, b in pairs if a[3] is not None and b[3] is not None]
        if chosen_pairs:
            checks["halves"] |= {
                "boundary_change": float(np.mean([abs(a - b) for a, b in chosen_pairs])),
                "same_boundary_share": float(np.mean([a == b for a, b in chosen_pairs])),
            }
    return checks


def _compare_boundaries(whole: int | None, other: int | None) -> dict[str, float]:
    if whole is None or other is None:
        return {}
    return {"boundary": float(other), "boundary_change": float(other - whole)}


def correlate(first: Array, second: Array) -> float:
    """Spearman's rank correlation; of constant profiles, which have no ranks, 1 when they are equal and else 0."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 1.0 if np.allclose(first, second) else 0.0
    return float(spearmanr(first, second).statistic)


def _summarise(
    ratio: Array, sensitivity: Array, group_of: NDArray[Any], chosen: NDArray[Any]
) -> tuple[Array, Array, Array, int | None]:
    """Task particle, sensitivity, scores and boundary of some probes: group means first, as in the profile."""
    groups = [chosen[group_of[chosen] == group] for group in np.unique(group_of[chosen])]
    particle = np.mean([ratio[indices].mean(0) for indices in groups], axis=0)
    sensitive = np.mean([sensitivity[indices].mean(0) for indices in groups], axis=0)
    scores = compute_alignment_scores(particle, sensitive)
    if not list_candidates(len(particle), "change_point", DEFAULT_MIN_SIDE):
        return particle, sensitive, scores, None
    return particle, sensitive, scores, int(find_best_boundary(scores, len(particle), "change_point", DEFAULT_MIN_SIDE))


def _split(group_of: NDArray[Any], rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two halves of each group; groups of one probe are in neither."""
    halves: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
    for group in np.unique(group_of):
        shuffled = rng.permutation(np.flatnonzero(group_of == group))
        size = len(shuffled) // 2
        halves[0].append(shuffled[:size])
        halves[1].append(shuffled[size : 2 * size])
    return np.concatenate(halves[0]), np.concatenate(halves[1])
