"""Figures of a run: heat maps, normalised profiles, scores per boundary, deviation violins, layer map, loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from layerplan.plan.boundary import compute_alignment_scores, normalize_min_max
from layerplan.plan.boundary_choice import SENSITIVITIES, BoundaryChoice, choose_boundary, get_sensitivity
from layerplan.plan.explain import read_choice
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile

Deviations = NDArray[np.float64]
PARTICLE, SENSITIVE, SCORE, MUTED, FROZEN = "#b45309", "#1d4ed8", "#15803d", "#6b7280", "#dbeafe"
EVEN = "#7e22ce"
DEVIATIONS = {"cosine": "cosine distance", "ce": "cross-entropy", "rank": "rank"}
matplotlib.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "text.parse_math": False,
    }
)


def build_layer_figures(
    profile: LayerProfile, plan: FreezePlan | None = None, deviations: Mapping[str, Deviations] | None = None
) -> dict[str, Figure]:
    """Returns the figures of a measurement by name.

    Args:
        profile: The measurement.
        plan: Adds the layer map and shades the frozen layers.
        deviations: SALF deviations per probe by kind, (N, L + 1); adds the violins of the kinds that the profile has.
    """
    choice = read_choice(plan) or choose_boundary(profile)
    figures = {
        "profiles": draw_profiles(profile, plan, choice),
        "alignment_score": draw_alignment(profile, choice),
        "task_particle": draw_heat_map(
            profile.task_particle_rows, profile.groups, "Task particle, Ratio(l)", colours="Greens"
        ),
        "layer_sensitivity": draw_heat_map(
            profile.layer_sensitivity_rows, profile.groups, "Layer sensitivity, LS(l)", colours="Reds"
        ),
    }
    if profile.semantic:
        figures["semantic"] = draw_semantic(profile)
    if deviations and not profile.semantic.keys().isdisjoint(deviations):
        figures["deviations"] = draw_deviations(deviations, profile)
    if plan is not None:
        figures["layer_map"] = draw_layer_map(plan)
    return figures


def draw_profiles(profile: LayerProfile, plan: FreezePlan | None, choice: BoundaryChoice) -> Figure:
    """Normalised task particle and sensitivity per layer with their intervals, the frozen layers shaded."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    num_layers = profile.model.num_layers
    for values, name, colour, style in (
        (profile.task_particle, "task_particle", PARTICLE, "o-"),
        (profile.layer_sensitivity, "layer_sensitivity", SENSITIVE, "s-"),
    ):
        axes.plot(range(len(values)), normalize_min_max(values), style, color=colour, label=name.replace("_", " "))
        intervals = profile.uncertainty.get(name, [])
        low, high = min(values), max(values)
        if intervals and high > low:
            lower = [(item.low - low) / (high - low) for item in intervals]
            upper = [(item.high - low) / (high - low) for item in intervals]
            axes.fill_between(range(len(values)), lower, upper, color=colour, alpha=0.15, linewidth=0)
    for layer in plan.frozen_layers if plan is not None else ():
        axes.axvspan(layer - 0.5, layer + 0.5, color="#e5e7eb", zorder=0, linewidth=0)
    if (best := choice.best_boundary) is not None:
        axes.axvline(best - 0.5, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate(
            f"best: {best}, p = {choice.p_value:.2g}",
            (best - 0.5, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=7,
            color=MUTED,
        )
    axes.set(xlabel="decoder layer (shaded: frozen)", ylabel="min-max normalised", xlim=(-0.5, num_layers - 0.5))
    # an interval can be far wider than the profile itself; the profile must stay readable
    axes.set_ylim(-0.25, 1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_alignment(profile: LayerProfile, choice: BoundaryChoice) -> Figure:
    """S(k) with both sensitivities, where the boundary may lie, and how often resamples of the probes choose it."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    boundaries = range(1, profile.model.num_layers - 1)
    for kind, colour in zip(SENSITIVITIES, (SCORE, SENSITIVE)):
        scores = compute_alignment_scores(profile.task_particle, get_sensitivity(profile, kind))
        is_used = kind == choice.sensitivity
        axes.plot(boundaries, scores, "o-" if is_used else ".--", color=colour, alpha=1 if is_used else 0.6, label=kind)
    intervals = profile.uncertainty.get("alignment_score", [])
    if intervals:
        low, high = [item.low for item in intervals], [item.high for item in intervals]
        axes.fill_between(boundaries, low, high, color=SCORE, alpha=0.15, linewidth=0)
    if choice.boundary_range is not None:
        first, last = choice.boundary_range
        axes.axvspan(first - 0.5, last + 0.5, color=MUTED, alpha=0.12, zorder=0, linewidth=0)
    axes.set(xlabel="boundary k: layers [0, k) are shallow", ylabel="alignment score S(k)")
    axes.legend(frameon=False, title="sensitivity", loc="upper left", bbox_to_anchor=(1.08, 1))
    shares = profile.probe_stability.get(choice.rule)
    if shares:
        chosen = axes.twinx()
        chosen.bar(boundaries, shares, color=MUTED, alpha=0.3, width=0.5)
        chosen.set(ylim=(0, 1), ylabel="share of resamples")
    return figure


def draw_heat_map(
    rows: Sequence[Sequence[float]], groups: Sequence[str], title: str, colours: str = "viridis"
) -> Figure:
    """Groups by layers; the colour scale is logarithmic, as ratios span orders of magnitude."""
    figure = Figure(figsize=(7, 0.9 + 0.22 * len(groups)), layout="constrained")
    axes = figure.subplots()
    floor = 1e-3
    values = [[max(value, floor) for value in row] for row in rows]
    largest = max(max(row) for row in values)
    image = axes.imshow(
        values, aspect="auto", cmap=colours, norm=matplotlib.colors.LogNorm(floor, max(largest, 10 * floor))
    )
    axes.set_yticks(range(len(groups)), [name.replace("_", " ") for name in groups], fontsize=7)
    axes.set(xlabel="decoder layer", title=title)
    figure.colorbar(image, ax=axes, fraction=0.03, format="%g")
    return figure


def draw_semantic(profile: LayerProfile) -> Figure:
    """SALF deviation from the gold label after k layers, each kind with its end-of-freezing layer."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    panels = figure.subplots(1, len(profile.semantic), squeeze=False)[0]
    for axes, (kind, values) in zip(panels, profile.semantic.items()):
        axes.plot(range(len(values.deviation)), values.deviation, "o-", color=SENSITIVE, markersize=3)
        axes.axvline(values.eof_layer, color=MUTED, linestyle="--", linewidth=1)
        axes.set(xlabel="layers passed")
        axes.set_title(f"{DEVIATIONS.get(kind, kind)}, freezes to {values.eof_layer}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_deviations(deviations: Mapping[str, Deviations], profile: LayerProfile) -> Figure:
    """Violins of the probes' deviations after each number of layers, a bar at the mean (SALF, Figure 5).

    Layers up to the end-of-freezing layer are blue, those SALF would train amber.
    """
    shown = [(kind, one.eof_layer, deviations[kind]) for kind, one in profile.semantic.items() if kind in deviations]
    figure = Figure(figsize=(7, 1.9 * len(shown)), layout="constrained")
    for axes, (kind, eof_layer, values) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown):
        positions = range(values.shape[1])
        # a violin needs a spread; a layer on which all probes agree is a bar
        spread = [index for index in positions if np.ptp(values[:, index]) > 0]
        if spread:
            drawn = axes.violinplot(values[:, spread], positions=spread, widths=0.85, showextrema=False)
            for index, body in zip(spread, drawn["bodies"]):
                is_frozen = index <= eof_layer
                body.set(facecolor=SENSITIVE if is_frozen else PARTICLE, alpha=0.35, linewidth=0)
        axes.hlines(values.mean(0), [p - 0.3 for p in positions], [p + 0.3 for p in positions], color="#111827")
        axes.set(ylabel=DEVIATIONS.get(kind, kind), xlim=(-0.7, values.shape[1] - 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layers passed (blue: up to SALF's end of freezing)")
    return figure


def draw_layer_map(plan: FreezePlan) -> Figure:
    """One cell per trainable unit, from the embeddings to the head; amber trains, blue is frozen."""
    cells = [("embed", plan.train_embeddings)]
    cells += [(str(layer), layer in plan.trainable_layers) for layer in range(plan.model.num_layers)]
    cells += [("norm", plan.train_final_norm), ("head", plan.train_lm_head)]
    partly = {str(layer) for layer in plan.trainable_modules}
    figure = Figure(figsize=(max(5.0, 0.28 * len(cells)), 0.9), layout="constrained")
    axes = figure.subplots()
    for index, (name, trains) in enumerate(cells):
        axes.bar(index, 1, width=0.92, color=FROZEN)
        # a layer that trains in part is half filled
        axes.bar(index, 0.5 if name in partly else 1, width=0.92, color=PARTICLE if trains else FROZEN)
        turned = 0 if name.isdigit() else 90
        colour = "white" if trains else "#1e3a8a"
        axes.text(index, 0.5, name, ha="center", va="center", fontsize=6.5, rotation=turned, color=colour)
    axes.set(xlim=(-0.6, len(cells) - 0.4), ylim=(0, 1))
    axes.set_title(f"{plan.plan_type}: amber trains, blue is frozen", fontsize=8, loc="left")
    axes.set_axis_off()
    return figure


def draw_loss(lines: Sequence[dict[str, Any]]) -> Figure:
    """Training and validation loss by step."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    for key, label, style, colour in (
        ("train/loss", "training", "-", SENSITIVE),
        ("validation/loss", "validation", "o--", PARTICLE),
    ):
        # after a return to a checkpoint steps are logged again: the newest value counts
        points = sorted({line["step"]: line[key] for line in lines if key in line}.items())
        if points:
            axes.plot(*zip(*points), style, color=colour, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    return figure
