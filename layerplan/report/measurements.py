"""Measurements of one model side by side: a table, how far they agree with each other, and a figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from layerplan.plan.cost import predict_cost
from layerplan.plan.explain import FROZEN, TRAINS
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.holm import correct_holm
from layerplan.plan.layer_evidence import find_step, rank_shares, rate_top
from layerplan.plan.layer_measurement import LayerMeasurement, LayerMeasurements
from layerplan.plan.markdown import as_text
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan

NUM_LEADING = 5
"""Layers named as those a measurement speaks for most."""


def render_measurements(found: LayerMeasurements, shape: ModelShape, *, seq_len: int) -> str:
    """The table as Markdown.

    Args:
        found: Measurements of one model.
        shape: Its sizes.
        seq_len: Tokens of a row, on which the cost of plans depends.
    """
    k = max(1, shape.num_layers // 2)
    return (
        "\n\n".join(
            [
                f"# Which layers should train? {as_text(found.model.name)}, {shape.num_layers} layers",
                _describe_texts(found.measurements),
                _render_table(found, shape, k, seq_len),
                "p (top) asks whether repeats of a measurement agree on its"
                f" {k} best layers, p (step) whether the values change at one boundary by more than in other orders of the"
                f" layers; both after Holm's correction over the {len(found.measurements)} measurements of the table."
                " Neither asks whether training those layers helps. W is the agreement of repeats over all layers (Kendall).",
                "Rank correlation of measurements, each turned so that large values speak for training a layer (Spearman):",
                _render_correlations(found.measurements),
            ]
        )
        + "\n"
    )


def draw_measurements(found: LayerMeasurements) -> Figure:
    """Ranks of the layers by measurement, dark where it speaks for training, with the values' own shape below."""
    names = [each.name.replace("_", " ") for each in found.measurements]
    ranks = np.stack([rank_shares([each.turned_values])[0] for each in found.measurements])
    figure = Figure(figsize=(8, 0.6 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(ranks, aspect="auto", cmap="Greens", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="decoder layer", title="Rank of each layer by measurement; dark speaks for training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="rank share", shrink=0.9)
    return figure


def _describe_texts(measurements: Sequence[LayerMeasurement]) -> str:
    texts = {each.text.sha256: each.text for each in measurements if each.text is not None}
    lines = [
        f"{text.num_rows} rows of {text.seq_len} tokens of {', '.join(map(as_text, text.sources))} ({text.sha256[:12]})"
        for text in texts.values()
    ]
    return "Text: " + "; ".join(lines) + "." if lines else "No text was read."


def _render_table(found: LayerMeasurements, shape: ModelShape, k: int, seq_len: int) -> str:
    tops = [rate_top(each.turned_repeats, k) for each in found.measurements]
    steps = [
        find_step(
            each.values, min_side=min(2, shape.num_layers // 2), freeze="either", higher_trains=each.higher_trains
        )
        for each in found.measurements
    ]
    top_p = correct_holm([1.0 if top.p_value is None else top.p_value for top in tops])
    step_p = correct_holm([1.0 if step is None else step.p_value for step in steps])
    lines = [
        f"| measurement | leading layers | {k} best layers | their FLOPs | W | p (top) | step | p (step) | repeats"
        " | seconds | TFLOP |",
        "|---|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for index, each in enumerate(found.measurements):
        plan = _plan_of(found, shape, each.rank()[:k])
        step, top = steps[index], tops[index]
        side = "-" if step is None else f"{step.boundary}, {step.freeze} freezes"
        seconds = "-" if each.cost.seconds is None else f"{each.cost.seconds:.0f}"
        lines.append(
            f"| {each.name.replace('_', ' ')} | {', '.join(map(str, each.rank()[:NUM_LEADING]))} |"
            f" `{_draw_map(plan)}` | {_price(plan, shape, seq_len):.0%} |"
            f" {'-' if top.agreement is None else f'{top.agreement:.2f}'} |"
            f" {'-' if top.p_value is None else f'{top_p[index]:.2g}'} | {side} |"
            f" {'-' if step is None else f'{step_p[index]:.2g}'} | {len(each.repeats)} {each.repeated_over} |"
            f" {seconds} | {each.cost.flops / 1e12:.2f} |"
        )
    return "\n".join(lines)


def _render_correlations(measurements: Sequence[LayerMeasurement]) -> str:
    names = [each.name.replace("_", " ") for each in measurements]
    turned = [each.turned_values for each in measurements]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for name, one in zip(names, turned):
        cells = [_correlate(one, other) for other in turned]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _correlate(one: list[float], other: list[float]) -> str:
    if len(set(one)) < 2 or len(set(other)) < 2:
        return "-"
    return f"{float(spearmanr(one, other).statistic):+.2f}"


def _plan_of(found: LayerMeasurements, shape: ModelShape, layers: Sequence[int]) -> FreezePlan:
    return FreezePlan(
        model=found.model,
        plan_type="explicit",
        trainable_layers=tuple(sorted(layers)),
        train_embeddings=False,
        train_final_norm=False,
        train_lm_head=False,
        tied="frozen" if shape.is_tied else "untied",
        reason="",
    )


def _draw_map(plan: FreezePlan) -> str:
    trained = set(plan.trainable_layers)
    return "".join(TRAINS if layer in trained else FROZEN for layer in range(plan.model.num_layers))


def _price(plan: FreezePlan, shape: ModelShape, seq_len: int) -> float:
    full = predict_cost(make_full_plan(plan.model, shape), shape, seq_len=seq_len)
    return predict_cost(plan, shape, seq_len=seq_len).total_flops / full.total_flops
