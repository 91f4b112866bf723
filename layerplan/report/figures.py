"""Figures of a run as matplotlib figures: heat maps, normalised profiles, scores per boundary, the loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from layerplan.plan.boundary import normalize_min_max
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile

PARTICLE, SENSITIVE, SCORE, MUTED = "#b45309", "#1d4ed8", "#15803d", "#6b7280"
matplotlib.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
)


def build_layer_figures(profile: LayerProfile, plan: FreezePlan | None = None) -> dict[str, Figure]:
    """Returns the figures of a measurement by name."""
    return {
        "profiles": draw_profiles(profile, plan),
        "alignment_score": draw_alignment(profile),
        "task_particle": draw_heat_map(profile.task_particle_rows, profile.groups, "Task particle, Ratio(l)"),
        "layer_sensitivity": draw_heat_map(profile.layer_sensitivity_rows, profile.groups, "Layer sensitivity, LS(l)"),
        "semantic": draw_semantic(profile),
    }


def draw_profiles(profile: LayerProfile, plan: FreezePlan | None) -> Figure:
    """Normalised task particle and sensitivity per layer, the frozen layers shaded."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    num_layers = profile.model.num_layers
    axes.plot(range(num_layers), normalize_min_max(profile.task_particle), "o-", color=PARTICLE, label="task particle")
    axes.plot(
        range(num_layers - 1), normalize_min_max(profile.layer_sensitivity), "s-", color=SENSITIVE, label="sensitivity"
    )
    for layer in plan.frozen_layers if plan is not None else ():
        axes.axvspan(layer - 0.5, layer + 0.5, color="#e5e7eb", zorder=0, linewidth=0)
    axes.axvline(profile.best_boundary - 0.5, color=MUTED, linestyle="--", linewidth=1)
    axes.set(xlabel="decoder layer (shaded: frozen)", ylabel="min-max normalised", xlim=(-0.5, num_layers - 0.5))
    axes.legend(frameon=False)
    return figure


def draw_alignment(profile: LayerProfile) -> Figure:
    """S(k) per boundary with its bootstrap interval, and how often each boundary wins."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    boundaries = range(1, len(profile.alignment_score) + 1)
    axes.plot(boundaries, profile.alignment_score, "o-", color=SCORE, label="S(k)")
    intervals = profile.uncertainty.get("alignment_score", [])
    if intervals:
        low, high = [item.low for item in intervals], [item.high for item in intervals]
        axes.fill_between(boundaries, low, high, color=SCORE, alpha=0.15, linewidth=0)
    axes.set(xlabel="boundary k: layers [0, k) are shallow", ylabel="alignment score S(k)")
    if profile.boundary_win_share:
        wins = axes.twinx()
        wins.bar(boundaries, profile.boundary_win_share, color=MUTED, alpha=0.3, width=0.5)
        wins.set(ylim=(0, 1), ylabel="share of resamples won")
    return figure


def draw_heat_map(rows: Sequence[Sequence[float]], groups: Sequence[str], title: str) -> Figure:
    """Groups by layers; the colour scale is logarithmic, as ratios span orders of magnitude."""
    figure = Figure(figsize=(7, 0.9 + 0.22 * len(groups)), layout="constrained")
    axes = figure.subplots()
    floor = 1e-3
    values = [[max(value, floor) for value in row] for row in rows]
    largest = max(max(row) for row in values)
    image = axes.imshow(
        values, aspect="auto", cmap="viridis", norm=matplotlib.colors.LogNorm(floor, max(largest, 10 * floor))
    )
    axes.set_yticks(range(len(groups)), [name.replace("_", " ") for name in groups], fontsize=7)
    axes.set(xlabel="decoder layer", title=title)
    figure.colorbar(image, ax=axes, fraction=0.03)
    return figure


def draw_semantic(profile: LayerProfile) -> Figure:
    """SALF deviation from the gold label after k layers, each kind with its end-of-freezing layer."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    for axes, (kind, values) in zip(figure.subplots(1, 3), profile.semantic.items()):
        axes.plot(range(len(values.deviation)), values.deviation, "o-", color=SENSITIVE, markersize=3)
        axes.axvline(values.eof_layer, color=MUTED, linestyle="--", linewidth=1)
        axes.set(title=f"{kind}, eof layer {values.eof_layer}", xlabel="layers passed")
    return figure


def draw_loss(lines: Sequence[dict[str, Any]]) -> Figure:
    """Training and validation loss by step."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    for key, label, style, colour in (
        ("train/loss", "training", "-", SENSITIVE),
        ("validation/loss", "validation", "o--", PARTICLE),
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), style, color=colour, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    return figure
