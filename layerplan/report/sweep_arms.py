"""The trials of a sweep as arms: seeds put together, compared with the base and with the best arm row by row.

Differences are paired: every model reads the same held-out rows, so what makes a row hard falls out. How far seeds move a
trial is measured over all arms that have several, as if it were alike in all, and counts for those of one seed too; where
no arm has two, it is not known, and intervals are of the rows alone. The best arm is chosen by the numbers it is then
compared by, so that p is corrected over all pairs of arms, of which these are some.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layerplan.plan.estimate import PooledEstimate, SeedSpread, Values, estimate_pooled, measure_seeds
from layerplan.run_folder import BASE, ROW_LOSSES_NAME
from layerplan.train.held_out_rows import RowLosses, load_losses
from layerplan.train.judge import VALIDATION
from layerplan.train.trial_record import TrialRecord, load_records

MIN_ROWS = 10
"""Fewer are not judged: that their differences are about normal cannot be seen, and matters."""
SIGNIFICANT = 0.05
Losses = dict[str, RowLosses]


@dataclass(frozen=True)
class Difference:
    """Of two losses, nats a token; the interval is None where there are too few rows."""

    value: float
    interval: tuple[float, float] | None
    p_value: float | None
    """Two-sided p-value of no difference, by the same estimate."""


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

    def has(self, text: str) -> bool:
        """Whether all of them have finite losses on a text."""
        return self.is_whole and all(
            text in losses and bool(np.isfinite(losses[text].nats).all()) for losses in self.losses
        )

    def on(self, text: str) -> list[RowLosses]:
        """Losses on a text, one of each seed."""
        return [losses[text] for losses in self.losses]

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

    def measure_seeds(self, text: str) -> SeedSpread | None:
        """How far seeds move an arm's loss on a text, over all arms; None where none has two."""
        arms = [arm for arm in self.arms if arm.has(text)]
        arms = [arm for arm in arms if _are_comparable([*arms[0].on(text), *arm.on(text)])]
        return measure_seeds(*_to_rates([arm.on(text) for arm in arms])) if arms else None

    def compare_with_base(self, arm: Arm, text: str) -> Difference | None:
        """An arm's loss on a text minus the base's; None where one of them was not measured."""
        base = self.base.get(text)
        if base is None or not arm.has(text) or not _are_comparable([base, *arm.on(text)]):
            return None
        return compare_with_untrained(arm.on(text), base, self.measure_seeds(text))

    def find_alike(self, text: str) -> list[Arm]:
        """Arms that cannot be told from the best one on a text, that one first.

        Which is best is chosen by the same rows, so that p-values are corrected over all pairs of arms (Bonferroni):
        where all arms are equal, any is told from the best in at most 5 % of sweeps.
        """
        whole = [arm for arm in self.arms if arm.has(text)]
        if not whole:
            return []
        ranked = sorted(whole, key=lambda arm: float(np.mean([losses.mean for losses in arm.on(text)])))
        best = ranked[0].on(text)
        ranked = [arm for arm in ranked if _are_comparable([*best, *arm.on(text)])]
        spread, num_pairs = self.measure_seeds(text), math.comb(len(ranked), 2)
        found = [compare(arm.on(text), best, spread) for arm in ranked[1:]]
        told = [each.p_value is not None and each.p_value * num_pairs < SIGNIFICANT for each in found]
        return [ranked[0], *(arm for arm, is_told in zip(ranked[1:], told) if not is_told)]


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


def compare(ours: Sequence[RowLosses], theirs: Sequence[RowLosses], spread: SeedSpread | None = None) -> Difference:
    """Mean over `ours` minus mean over `theirs`, each a seed, on the same rows.

    Args:
        ours: Losses of the seeds of one arm.
        theirs: Of the other.
        spread: How far seeds lie apart, where more is known of it than from these.
    """
    (one, other), labels = _to_rates([ours, theirs])
    return _describe(estimate_pooled(one, weights_N=labels, minus_SN=other, spread=spread), len(labels))


def compare_with_untrained(ours: Sequence[RowLosses], base: RowLosses, spread: SeedSpread | None = None) -> Difference:
    """The same against a model that has no seeds."""
    (one, other), labels = _to_rates([ours, [base]])
    return _describe(estimate_pooled(one - other, weights_N=labels, spread=spread), len(labels))


def _to_rates(arms: Sequence[Sequence[RowLosses]]) -> tuple[list[Values], Values]:
    """Nats a token of every arm, seeds by rows, and the tokens of the rows; rows without tokens are left out."""
    labels = arms[0][0].labels.astype(np.float64)
    asked = labels > 0
    return [np.stack([each.nats[asked] / labels[asked] for each in arm]) for arm in arms], labels[asked]


def _describe(estimate: PooledEstimate, num_rows: int) -> Difference:
    if num_rows < MIN_ROWS:
        return Difference(estimate.mean, None, None)
    return Difference(estimate.mean, estimate.interval(), estimate.p_different())


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other one beats in one coordinate without losing in the other; low is good."""
    order = sorted(range(len(points)), key=lambda place: points[place])
    front: list[int] = []
    for place in order:
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front
