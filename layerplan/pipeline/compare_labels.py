"""Verdicts over finished fine-tunings on labels: the base and every run, pair by pair, prompt by prompt.

Runs of one task and one base are compared; p-values are corrected over all comparisons and metrics made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from eval.label_scores import METRICS, NONE, Metric, compare_seeds, compute_metric, count_confusion
from eval.tables import render_table
from layerplan.config.base import StrictModel
from layerplan.corpus.manifest import Manifest
from layerplan.errors import EvaluationError
from layerplan.intervals import show_difference
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.holm import correct_holm
from layerplan.run_folder import (
    BASE,
    LABEL_SCORES_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    RESULT_NAME,
    SAMPLES_NAME,
    STORE_NAME,
    RunFolder,
    name_step,
)
from layerplan.train.request import load_result

NEEDED = (SAMPLES_NAME, LABEL_SCORES_NAME, f"{STORE_NAME}/{MANIFEST_NAME}", PLAN_NAME)
"""What is read of a run, beside its config and result."""
BASE_ARM = "the base"


class LabelComparison(StrictModel):
    """One arm beside another on one test, by one metric; shares."""

    task: str
    """Name of the task."""
    run: str
    """What is judged: a run, or the first of the seeds of an arm."""
    reference: str
    """What it is compared with."""
    num_seeds: int
    """Runs of the arm."""
    num_prompts: int
    """Prompts of the test."""
    metric: Metric
    """Accuracy, macro or weighted F1."""
    reference_value: float
    """Mean over the reference's seeds."""
    value: float
    """Mean over the arm's seeds."""
    difference: float
    """Of the arm from the reference."""
    interval: tuple[float, float]
    """95 %, over prompts."""
    adjusted_p: float
    """Two-sided, corrected by Holm's method over everything that is compared at once."""

    @property
    def sentence(self) -> str:
        """The finding in one line, in percent."""
        low, high = (100 * each for each in self.interval)
        gap = show_difference(100 * self.difference, (low, high), 1)
        told = "differs from" if self.adjusted_p < 0.05 else "is not told from"
        return (
            f"{self.run}, {self.metric.replace('_', ' ')}: {100 * self.value:.1f} {told} {self.reference}'s"
            f" {100 * self.reference_value:.1f} ({gap}, p = {self.adjusted_p:.3g})"
        )


@dataclass(frozen=True)
class _Arm:
    """Predictions of a model, one list of classes per seed."""

    name: str
    predicted: list[list[int]]


def is_label_run(run: Path) -> bool:
    """Whether a folder is one of a scored fine-tuning on labels."""
    return RunFolder(run).label_scores.exists()


def judge_label_runs(groups: Sequence[Sequence[Path]], names: Mapping[Path, str]) -> list[LabelComparison]:
    """Verdicts of every metric: arms against the first run's base, then against each other.

    Args:
        groups: Runs of each arm, which differ in the seed alone.
        names: What each run is called.

    Raises:
        EvaluationError: When a run is not finished, or runs are of different tasks, bases or numbers of seeds.
    """
    runs = [RunFolder(run) for group in groups for run in group]
    _check_alike(runs)
    facts = Manifest.load(runs[0].token_store).labels
    assert facts is not None
    places = {token: place for place, token in enumerate(facts.label_ids.values())}
    gold, base = _read(runs[0], BASE, places)
    arms = [_Arm(BASE_ARM, [base])]
    for group in groups:
        read = [_read(RunFolder(run), _last(RunFolder(run)), places) for run in group]
        if any(each != gold for each, _ in read):
            raise EvaluationError(f"{group[0]}: was scored on other prompts than {runs[0].root}")
        arms.append(_Arm(names[group[0]], [predicted for _, predicted in read]))
    pairs = list(combinations(arms, 2))
    found = [
        comparison
        for reference, arm in pairs
        for comparison in _compare(facts.task, gold, reference, arm, len(places), len(pairs) * len(METRICS))
    ]
    adjusted = correct_holm([each.adjusted_p for each in found])
    return [each.model_copy(update={"adjusted_p": p}) for each, p in zip(found, adjusted, strict=True)]


def _check_alike(runs: Sequence[RunFolder]) -> None:
    first = runs[0]
    task, base = _name_task(first), _name_base(first)
    for run in runs[1:]:
        if (other := _name_task(run)) != task:
            raise EvaluationError(
                f"{run.root}: is of the task {other[0]} (sha256 {other[1][:12]}), {first.root} of {task[0]}"
                f" ({task[1][:12]}); only runs of the same prompts are compared"
            )
        if _name_base(run) != base:
            raise EvaluationError(f"{run.root}: began from another base than {first.root}; compare them apart")


def _name_task(run: RunFolder) -> tuple[str, str, tuple[tuple[str, int], ...]]:
    labels = Manifest.load(run.token_store).labels if run.label_scores.exists() else None
    if labels is None:
        raise EvaluationError(f"{run.root}: has no scores on labels; it is no finished fine-tuning")
    return labels.task, labels.task_sha256, tuple(labels.label_ids.items())


def _name_base(run: RunFolder) -> tuple[str | None, str, int]:
    model = FreezePlan.load(run.plan).model
    return model.weights_sha256, model.model_type, model.num_layers


def _last(run: RunFolder) -> str:
    result = load_result(run.root)
    if result is None:
        raise EvaluationError(f"{run.root}: has no {RESULT_NAME}; only finished runs can be compared")
    return name_step(result.final_step)


def _read(run: RunFolder, label: str, places: dict[int, int]) -> tuple[list[tuple[str, int]], list[int]]:
    """The prompts with their classes, and the predicted ones."""
    path = run.samples_of(label, "test")
    if not path.exists():
        raise EvaluationError(f"{path}: is gone; predictions are what runs are compared by")
    records = pq.read_table(path, columns=["id", "label_id", "predicted_id"]).to_pylist()
    gold = [(record["id"], places[record["label_id"]]) for record in records]
    return gold, [places.get(record["predicted_id"], NONE) for record in records]


def _compare(
    task: str, gold: Sequence[tuple[str, int]], reference: _Arm, arm: _Arm, num_classes: int, num_tests: int
) -> list[LabelComparison]:
    truth = [place for _, place in gold]
    first, second = reference.predicted, arm.predicted
    if reference.name == BASE_ARM:
        first = first * len(second)  # it has no seeds
    verdicts = compare_seeds(truth, first, second, num_classes, num_tests=num_tests)
    return [
        LabelComparison(
            task=task,
            run=arm.name,
            reference=reference.name,
            num_seeds=len(second),
            num_prompts=len(truth),
            metric=metric,
            reference_value=_mean(truth, first, num_classes, metric),
            value=_mean(truth, second, num_classes, metric),
            difference=verdicts[metric].difference,
            interval=verdicts[metric].interval,
            adjusted_p=verdicts[metric].p_value,
        )
        for metric in METRICS
    ]


def _mean(truth: Sequence[int], seeds: Sequence[Sequence[int]], num_classes: int, metric: Metric) -> float:
    counts = [count_confusion(np.asarray(truth), np.asarray(guess), num_classes) for guess in seeds]
    return float(np.mean([compute_metric(each, metric) for each in counts]))


def render_label_scores(comparisons: Sequence[LabelComparison], *, style: str) -> str:
    """A row per model with its metrics in percent, as Markdown or LaTeX."""
    values: dict[str, dict[Metric, float]] = {}
    for each in comparisons:
        values.setdefault(each.reference, {})[each.metric] = each.reference_value
        values.setdefault(each.run, {})[each.metric] = each.value
    rows = [[name, *(f"{100 * found[metric]:.1f}" for metric in METRICS)] for name, found in values.items()]
    title = f"{comparisons[0].task}, {comparisons[0].num_prompts:,} prompts, percent"
    return render_table(title, ["Models", *(metric.replace("_", " ") for metric in METRICS)], rows, style=style)
