"""The page's part on prompts with a label: scores before and after, what was not propagated, deviations by layer."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerplan.intervals import show_difference
from layerplan.report.answer_tables import tabulate_use
from layerplan.report.answers import Cost, read_json
from layerplan.report.headline import rate
from layerplan.report.html_parts import make_wide, render_sentence, render_table
from layerplan.run_folder import BASE, RunFolder

METRICS = ("accuracy", "macro_f1", "weighted_f1")
_SCORES_NOTE = (
    "Percent, with 95 % intervals over prompts. A prediction is the most likely next token over the whole vocabulary; one that is"
    " no label counts as wrong. p is that of no difference, prompt by prompt; it is not corrected for the three metrics."
)
_COST_NOTE = (
    "Shares of a backward pass through every decoder layer that were not run. Depth is the mean start layer over the number of"
    " layers; FLOPs are those of the layers' backward passes, the head and adapters left out. Planned: by the start layers of"
    " the rows; counted: while the backward passes ran."
)
_DEVIATION_NOTE = (
    "Cosine deviation of the state after each layer from the label's semantic basis, over the prompts of the test: 0 is the"
    " label, 1 at right angles to it."
)


def render_labels(run: RunFolder, cost: Cost | None) -> str:
    """HTML of a fine-tuning on labels; empty for a run of another kind, and for one that is not scored yet.

    Args:
        run: The run's folder.
        cost: Time and memory; what it says of work is that of a plan whose every layer trains, and not shown.
    """
    scores = read_json(run.label_scores)
    if not scores:
        return ""
    return (
        _render_scores(scores)
        + _render_classes(scores["models"])
        + _render_saving(read_json(run.label_cost), cost)
        + _render_deviations(scores["models"], run.deviations)
    )


def _render_scores(scores: Mapping[str, Any]) -> str:
    verdicts, models = scores["verdicts"], list(scores["models"].values())
    rows = []
    for metric in METRICS:
        verdict = verdicts[metric]
        low, high = (100 * each for each in verdict["interval"])
        change = f"{100 * verdict['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
        cells = [_with_interval(model, metric) for model in models]
        rows.append([metric.replace("_", " "), *cells, change, f"{verdict['p_value']:.3g}"])
    rows.append(["answers that are no label", *(f"{model['num_no_label']:,}" for model in models), "", ""])
    headings = ["", *(label if label == BASE else f"trained, {label}" for label in scores["models"]), "change", "p"]
    first = models[0]
    asked = f"{html.escape(first['task'])}: {first['num_asked']:,} prompts of {len(first['classes'])} classes."
    table = render_table(headings, rows)
    verdict = _judge(verdicts["accuracy"], first["accuracy"], models[-1]["accuracy"])
    return f'<h2>Does it name the labels?</h2><p>{asked}</p>{verdict}{table}<p class="soft">{_SCORES_NOTE}</p>'


def _judge(verdict: Mapping[str, Any], base: float, trained: float) -> str:
    outcome = rate(verdict["difference"], verdict["p_value"])
    told = {"better": "better than the base", "worse": "worse than the base"}.get(
        outcome, "not distinguishable from the base"
    )
    low, high = (100 * each for each in verdict["interval"])
    gap = show_difference(100 * verdict["difference"], (low, high), 1)
    return render_sentence(
        f"{told[0].upper()}{told[1:]}: {100 * trained:.1f} % of the labels named, against {100 * base:.1f} %"
        f" ({gap} points, p = {verdict['p_value']:.3g}).",
        outcome,
    )


def _with_interval(model: Mapping[str, Any], metric: str) -> str:
    low, high = (100 * each for each in model["intervals"][metric])
    return f"{100 * model[metric]:.1f} [{low:.1f}, {high:.1f}]"


def _render_classes(models: Mapping[str, Any]) -> str:
    """Right answers by class, folded."""
    classes = next(iter(models.values()))["classes"]
    rows = []
    for place, name in enumerate(classes):
        counts = [model["confusion"][place] for model in models.values()]
        rows.append([name, f"{sum(counts[0]):,}", *(f"{row[place]:,}" for row in counts)])
    table = render_table(["class", "prompts", *(f"right, {label}" for label in models)], rows)
    return f"<details><summary>By class</summary>{table}</details>"


def _render_saving(saved: Mapping[str, Any], cost: Cost | None) -> str:
    if not saved:
        return ""
    rows = [[name, f"{saved[name]['depth']:.1%}", f"{saved[name]['flops']:.1%}"] for name in ("planned", "counted")]
    counts = [[str(layer), f"{count:,}"] for layer, count in enumerate(saved["propagated_rows"]) if count]
    took = "" if cost is None else render_table(*tabulate_use(cost))
    return (
        "<h2>What was not propagated</h2>"
        + render_table(["saved", "by depth", "by FLOPs"], rows)
        + f'<p class="soft">{_COST_NOTE}</p>'
        + f"<details><summary>Rows by start layer</summary>{render_table(['layer', 'rows'], counts)}</details>"
        + took
    )


def _render_deviations(models: Mapping[str, Any], picture: Path) -> str:
    columns = [model["mean_deviation"] for model in models.values()]
    rows = [[_name_state(layer), *(f"{column[layer]:.3f}" for column in columns)] for layer in range(len(columns[0]))]
    table = render_table(["state", *models], rows)
    return (
        f"<h2>How far each layer is from the label</h2>{_embed_png(picture)}"
        f'<p class="soft">{_DEVIATION_NOTE}</p><details><summary>Means by layer</summary>{table}</details>'
    )


def _name_state(layer: int) -> str:
    return "embeddings" if layer == 0 else f"after layer {layer - 1}"


def _embed_png(path: Path) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    description = "Distribution of the deviations at every layer, before and after training"
    picture = f'<img alt="{description}" src="data:image/png;base64,{data}">'
    return f"<figure>{make_wide(picture)}</figure>"
