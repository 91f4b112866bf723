"""Do the probes mean anything? What the model answers, and whether right and wrong answers measure the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerplan.config.plan import DEFAULT_MIN_SIDE
from layerplan.plan.boundary import compute_alignment_scores, find_best_boundary, list_candidates
from layerplan.plan.layer_profile import ENOUGH_ANSWERS, AnswerComparison
from layerplan.tracer.stability import correlate

Array = NDArray[np.float64]
NUM_SHUFFLES = 999


def average_by_group(records: Sequence[dict[str, Any]], column: str) -> dict[str, float]:
    """Mean of a column in each group, in order of appearance; empty when records of an older tracer lack it."""
    if any(record.get(column) is None for record in records):
        return {}
    values: dict[str, list[float]] = {}
    for record in records:
        values.setdefault(record["group"], []).append(float(record[column]))
    return {group: float(np.mean(found)) for group, found in values.items()}


def compare_answers(
    ratio: Array, sensitivity: Array, group_of: NDArray[Any], is_right: NDArray[np.bool_], *, seed: int
) -> AnswerComparison | None:
    """Compares the profiles of right and of wrong answers within the groups that hold both.

    Within, since groups differ in their share of right answers and in what they measure: comparing all right answers with
    all wrong ones would compare groups. p is the share of random assignments of right and wrong within the groups whose
    profiles lie at least as far apart, in standard errors summed over layers and both profiles.

    Args:
        ratio: Ratio(l) per probe, (N, L).
        sensitivity: Sensitivity per probe, (N, L - 1).
        group_of: Group of each probe, (N,).
        is_right: Whether it was answered rightly, (N,).
        seed: Of the assignments.

    Returns:
        None when fewer than 30 of either kind are in groups that hold both.
    """
    mixed = [group for group in np.unique(group_of) if 0 < is_right[group_of == group].mean() < 1]
    chosen = np.isin(group_of, mixed)
    num_right, num_wrong = int(is_right[chosen].sum()), int((~is_right[chosen]).sum())
    if min(num_right, num_wrong) < ENOUGH_ANSWERS:
        return None
    values = np.concatenate([ratio, sensitivity], axis=1)
    members = [np.flatnonzero(group_of == group) for group in mixed]
    labels = _shuffle_labels([is_right[indices] for indices in members], np.random.default_rng([seed, 5]))
    right, wrong = _average_kinds([values[indices] for indices in members], labels)
    gaps = right - wrong
    spread = gaps[1:].std(0)
    distance = (np.square(gaps) / np.where(spread > 0, spread, 1.0) ** 2).sum(1)
    num_layers = ratio.shape[1]
    profiles = [(kind[0, :num_layers], kind[0, num_layers:]) for kind in (right, wrong)]
    return AnswerComparison(
        num_right=num_right,
        num_wrong=num_wrong,
        task_particle_correlation=correlate(profiles[0][0], profiles[1][0]),
        sensitivity_correlation=correlate(profiles[0][1], profiles[1][1]),
        right_boundary=_find_boundary(*profiles[0]),
        wrong_boundary=_find_boundary(*profiles[1]),
        p_value=float((distance >= distance[0] * (1 - 1e-12)).mean()),
    )


def _shuffle_labels(labels: Sequence[NDArray[np.bool_]], rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Per group the given labels, and below them shuffled ones: (1 + shuffles, probes of the group)."""
    return [np.concatenate([own[None], rng.permuted(np.tile(own, (NUM_SHUFFLES, 1)), axis=1)]) for own in labels]


def _average_kinds(values: Sequence[Array], labels: Sequence[NDArray[np.bool_]]) -> tuple[Array, Array]:
    """Means of right and of wrong probes, groups weighted by what they tell of the difference: (1 + shuffles, values)."""
    rights, wrongs, weights = [], [], []
    for found, is_right in zip(values, labels):
        count = is_right[0].sum()
        rights.append(is_right @ found / count)
        wrongs.append(~is_right @ found / (len(found) - count))
        weights.append(count * (len(found) - count) / len(found))
    return np.average(rights, axis=0, weights=weights), np.average(wrongs, axis=0, weights=weights)


def _find_boundary(particle: Array, sensitivity: Array) -> int | None:
    num_layers = len(particle)
    if not list_candidates(num_layers, "change_point", DEFAULT_MIN_SIDE):
        return None
    scores = compute_alignment_scores(particle, sensitivity)
    return int(find_best_boundary(scores, num_layers, "change_point", DEFAULT_MIN_SIDE))
