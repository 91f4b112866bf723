"""The trials of a sweep as arms: seeds put together, compared with the base and with the best arm row by row.

Differences are paired: every model reads the same held-out rows, so what makes a row hard falls out. Intervals are 95 %
bootstrap intervals over rows, and over seeds where an arm has several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from layerplan.plan.holm import correct_holm
from layerplan.run_folder import BASE, ROW_LOSSES_NAME
from layerplan.train.held_out_rows import RowLosses, load_losses
from layerplan.train.judge import VALIDATION
from layerplan.train.trial_record import TrialRecord, load_records

RESAMPLES = 2000
MIN_ROWS = 10
"""Fewer cannot be resampled."""
SIGNIFICANT = 0.05
SEED = 11
Losses = dict[str, RowLosses]


@dataclass(frozen=True)
class Difference:
    """Of two losses, nats a token; the interval is None where there are too few rows."""

    value: float
    interval: tuple[float, float] | None
    p_value: float | None
    """Two-sided bootstrap p-value of no difference."""


@dataclass(frozen=True)
class Arm:
    """Trials that differ in their seed alone."""

    records: tuple[TrialRecord, ...]
    losses: tuple[Losses, ...]
    """Of those that came to their last step."""

    @property
    def first(self) -> TrialRecord:
        """The one that stands for what they have in common."""
        return self.records[0]

    @property
    def is_whole(self) -> bool:
        """Whether all of them came to their last step and left losses row by row."""
        return bool(self.losses) and len(self.losses) == len(self.records)

    @property
    def loss(self) -> float:
        """Mean over seeds of what the sweep wants low."""
        return float(np.mean([math.inf if each.loss is None else each.loss for each in self.records]))

    @property
    def flops(self) -> float:
        """Predicted FLOPs of what one of them trained for."""
        return float(np.mean([(each.flops or 0.0) * each.step / each.max_steps for each in self.records]))

    @property
    def name(self) -> str:
        """Of the trial, without its seed where there are several."""
        name = self.first.name
        return name if len(self.records) == 1 else name.rpartition("_seed")[0] or name

    @property
    def curve(self) -> tuple[str, str, float | None]:
        """Side, ends and learning rate: arms that share them lie on one curve over the boundary."""
        return self.first.freeze, self.first.ends, self.first.learning_rate


@dataclass(frozen=True)
class SweepReading:
    """What a sweep left, read once."""

    arms: tuple[Arm, ...]
    """Best first; whole ones before others."""
    base: Losses
    texts: tuple[str, ...]
    """The corpus's own held-out rows first, then the further texts."""

    def compare_with_base(self, arm: Arm, text: str) -> Difference | None:
        """An arm's loss on a text minus the base's; None where one of them was not measured."""
        base = self.base.get(text)
        rows = [losses[text] for losses in arm.losses if text in losses]
        return compare(rows, [base]) if base is not None and arm.is_whole and _are_comparable([base, *rows]) else None

    def find_alike(self, text: str) -> list[Arm]:
        """Arms that cannot be told from the best one on a text, that one first; Holm-corrected over all comparisons."""
        whole = [arm for arm in self.arms if arm.is_whole and all(text in losses for losses in arm.losses)]
        if not whole:
            return []
        ranked = sorted(whole, key=lambda arm: float(np.mean([losses[text].mean for losses in arm.losses])))
        best = [losses[text] for losses in ranked[0].losses]
        ranked = [arm for arm in ranked if _are_comparable([*best, *(losses[text] for losses in arm.losses)])]
        found = [compare([losses[text] for losses in arm.losses], best) for arm in ranked[1:]]
        adjusted = correct_holm([1.0 if each.p_value is None else each.p_value for each in found])
        return [ranked[0], *(arm for arm, p in zip(ranked[1:], adjusted) if p >= SIGNIFICANT)]


def read_sweep(sweep: Path) -> SweepReading | None:
    """Reads the trials of a sweep's folder; None when none has ended.

    Raises:
        ConfigError: When a record cannot be read.
        CorpusError: When losses cannot be read.
    """
    records = load_records(sweep)
    if not records:
        return None
    groups: dict[tuple[object, ...], list[TrialRecord]] = {}
    for record in records:
        groups.setdefault((record.boundary, record.freeze, record.ends, record.learning_rate), []).append(record)
    arms = []
    for group in groups.values():
        ordered = sorted(group, key=lambda each: (each.seed is None, each.seed))
        ordered = [each for each in ordered if not each.was_stopped] or ordered  # a seed that was stopped is no result
        losses = [load_losses(sweep / each.name / ROW_LOSSES_NAME) for each in ordered if not each.was_stopped]
        arms.append(Arm(tuple(ordered), tuple(each for each in losses if each)))
    arms.sort(key=lambda arm: (any(each.was_stopped for each in arm.records), arm.loss, arm.name))
    base = load_losses(sweep / BASE / ROW_LOSSES_NAME)
    names = dict.fromkeys(name for losses in (base, *(one for arm in arms for one in arm.losses)) for name in losses)
    texts = sorted(names, key=lambda name: name != VALIDATION)
    return SweepReading(tuple(arms), base, tuple(texts))


def _are_comparable(losses: Sequence[RowLosses]) -> bool:
    """Whether they are of the same rows."""
    return len(losses) > 1 and len({each.rows_sha256 for each in losses}) == 1


def compare(ours: Sequence[RowLosses], theirs: Sequence[RowLosses]) -> Difference:
    """Mean over `ours` minus mean over `theirs`, each a seed, on the same rows."""
    labels = ours[0].labels.astype(np.float64)
    one, other = (np.stack([each.nats for each in side]) for side in (ours, theirs))
    value = float((one.mean(0) - other.mean(0)).sum() / labels.sum())
    if len(labels) < MIN_ROWS:
        return Difference(value, None, None)
    rng = np.random.default_rng([SEED, len(labels), len(ours), len(theirs)])
    gaps = np.array([_resample(one, other, labels, rng) for _ in range(RESAMPLES)])
    low, high = (float(each) for each in np.quantile(gaps, [0.025, 0.975]))
    sides = [(1 + (side <= 0).sum()) / (1 + RESAMPLES) for side in (gaps, -gaps)]
    return Difference(value, (low, high), float(min(1.0, 2 * min(sides))))


def _resample(
    one: NDArray[np.float64], other: NDArray[np.float64], labels: NDArray[np.float64], rng: np.random.Generator
) -> float:
    rows = rng.integers(0, len(labels), size=len(labels))
    drawn = [side[rng.integers(0, len(side), size=len(side))][:, rows].mean(0) for side in (one, other)]
    return float((drawn[0] - drawn[1]).sum() / labels[rows].sum())


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other one beats in one coordinate without losing in the other; low is good."""
    order = sorted(range(len(points)), key=lambda place: points[place])
    front: list[int] = []
    for place in order:
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front
