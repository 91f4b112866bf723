"""What a fine-tuning is scored by: predictions before and after, the test of their difference, and what was not computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.label_encoding import EncodedTask
from eval.label_scores import METRICS, NONE, LabelScores, LabelVerdict, Metric, compare_labels, score_labels
from layerplan.artifacts import write_json
from layerplan.config.finetune import FinetuneConfig
from layerplan.models.ref import ModelRef
from layerplan.pipeline.label_stages import make_samples
from layerplan.pipeline.stages import RunContext, say, tracked
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.start_cost import CostSaving, compute_saving
from layerplan.report.deviations import draw_deviations
from layerplan.run_folder import parse_step
from layerplan.tracer.samples import measure_samples
from layerplan.train.request import TrainResult


@dataclass(frozen=True)
class ScoredModel:
    """A model's predictions on the test, as class indices, its scores, and the deviations of each layer."""

    label: str
    predicted: list[int]
    scores: LabelScores
    deviations: list[list[float]]
    """Cosine deviations of the states 0..L, by prompt."""


def score_model(context: RunContext, model: ModelRef, task: EncodedTask, label: str) -> ScoredModel:
    """Measures the test prompts with a model; its records stay in the run folder."""
    path = context.folder.samples_of(label, "test")
    with tracked(context, f"score_{label}") as tracker:
        records = measure_samples(
            model,
            make_samples(task.test),
            context.config.trace,
            path=path,
            report=lambda line: say("score", f"{label}: {line}"),
        )
        scored = _score(task, records, label)
        values = {f"label/{metric}": getattr(scored.scores, metric) for metric in METRICS}
        tracker.log_metrics(values, step=parse_step(label) or 0)
        tracker.log_artifact(path)
    say("score", f"{label}: {describe_scores(scored.scores)}")
    return scored


def _score(task: EncodedTask, records: Sequence[dict[str, Any]], label: str) -> ScoredModel:
    places = {token: index for index, token in enumerate(task.label_ids.values())}
    predicted = [places.get(record["predicted_id"], NONE) for record in records]
    gold = [places[record["label_id"]] for record in records]
    scores = score_labels(gold, predicted, list(task.label_ids), task=task.name, task_sha256=task.sha256)
    return ScoredModel(label, predicted, scores, [record["deviation_cosine"] for record in records])


def describe_scores(scores: LabelScores) -> str:
    """Scores in one line, in percent."""
    parts = [
        f"{metric.replace('_', ' ')} {100 * getattr(scores, metric):.1f}"
        f" [{100 * scores.intervals[metric][0]:.1f}, {100 * scores.intervals[metric][1]:.1f}]"
        for metric in METRICS
    ]
    return f"{', '.join(parts)} over {scores.num_asked:,} prompts, {scores.num_no_label:,} answers no label"


def judge_labels(
    context: RunContext, task: EncodedTask, base: ScoredModel, trained: ScoredModel
) -> dict[Metric, LabelVerdict]:
    """Compares the trained model with the base; writes `label_scores.json` and the figure of the deviations."""
    places = {token: index for index, token in enumerate(task.label_ids.values())}
    gold = [places[prompt.label_id] for prompt in task.test]
    verdicts = compare_labels(gold, base.predicted, trained.predicted, len(places))
    write_json(
        context.folder.label_scores,
        {
            "models": {
                each.label: each.scores.model_dump(mode="json")
                | {"mean_deviation": np.mean(each.deviations, axis=0).tolist()}
                for each in (base, trained)
            },
            "verdicts": {name: verdict.model_dump(mode="json") for name, verdict in verdicts.items()},
        },
    )
    draw_deviations(base.deviations, trained.deviations, context.folder.deviations)
    for path in (context.folder.label_scores, context.folder.deviations):
        context.tracker.log_artifact(path)
    return verdicts


def record_cost(
    context: RunContext,
    model: ModelRef,
    section: FinetuneConfig,
    plan: FreezePlan,
    starts: Sequence[int],
    result: TrainResult,
) -> dict[str, CostSaving]:
    """Writes what the start layers save as planned, and as counted while the backward passes ran."""
    counted = {layer: count for layer, count in enumerate(result.propagated_rows) if count}
    tokens = max(1, result.tokens_seen // max(1, sum(counted.values())))
    shape = model.shape()

    def save(rows: Any) -> CostSaving:
        return compute_saving(
            rows, plan, shape, seq_len=tokens, trains_alone=section.method == "lift", trains_adapters=section.uses_lora
        )

    cost = {"planned": save(list(starts)), "counted": save(counted)}
    values = {name: saving.model_dump(mode="json") for name, saving in cost.items()}
    write_json(context.folder.label_cost, values | {"propagated_rows": list(result.propagated_rows)})
    context.tracker.log_artifact(context.folder.label_cost)
    return cost


def print_label_summary(
    context: RunContext,
    section: FinetuneConfig,
    base: ScoredModel,
    trained: ScoredModel,
    verdicts: dict[Metric, LabelVerdict],
    cost: dict[str, CostSaving],
) -> None:
    """Prints scores before and after, their differences, and the backward passes saved, by depth and by FLOPs."""
    print(
        f"\nmethod    {section.method}, loss {section.loss}, budget {section.budget if section.has_budget else 'none'}"
    )
    for scored in (base, trained):
        print(f"{scored.label:<14}{describe_scores(scored.scores)}")
    for verdict in verdicts.values():
        low, high = verdict.interval
        print(
            f"{'change':<14}{verdict.metric.replace('_', ' ')} {100 * verdict.difference:+.1f} points"
            f" [{100 * low:+.1f}, {100 * high:+.1f}], p = {verdict.p_value:.3g}"
        )
    for name, saving in cost.items():
        print(f"{'saved':<14}{name}: depth {saving.depth:.1%}, backward FLOPs {saving.flops:.1%} of the layers'")
    print(f"\nscores    {context.folder.label_scores}\nreport    {context.folder.report}")
