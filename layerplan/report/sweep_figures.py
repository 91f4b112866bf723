"""Figures of a sweep: loss over boundary, adaptation against forgetting, cost against score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerplan.report.figures import EVEN, MUTED, PARTICLE, SCORE, SENSITIVE
from layerplan.report.sweep_arms import Arm, Difference, SweepReading, find_front
from layerplan.train.judge import VALIDATION

SIDES = {
    "deep": ("o", PARTICLE, "trains shallow"),
    "shallow": ("s", SENSITIVE, "trains deep"),
    "spread": ("^", EVEN, "trains as many as above, evenly spaced"),
}
"""Marker, colour and name by the side that freezes, or of layers that are evenly spaced and as many as above the boundary."""
STYLES = ("-", "--", ":", "-.")


def name_text(text: str) -> str:
    """A text's name for a reader."""
    return "held-out rows of the corpus" if text == VALIDATION else text


def draw_boundaries(reading: SweepReading, text: str) -> Figure:
    """Loss minus the base's over boundary, a curve for each side, ends and learning rate, with intervals."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    curves = list(dict.fromkeys(arm.curve for arm in reading.arms))
    for curve in sorted(curves, key=str):
        side, ends, rate = curve
        marker, colour, name = SIDES[side]
        same_side = sorted((each for each in curves if each[0] == side), key=str)
        style = STYLES[same_side.index(curve) % len(STYLES)]
        label = name if len(same_side) == 1 else f"{name}, {ends.replace('_', ' ')}, rate {rate:g}"
        arms = sorted((arm for arm in reading.arms if arm.curve == curve), key=lambda arm: arm.first.boundary)
        found = [(arm, difference) for arm in arms if (difference := reading.compare_with_base(arm, text)) is not None]
        if found:
            _draw_curve(axes, found, marker=marker, color=colour, linestyle=style, label=label)
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=":")
    axes.set(xlabel="boundary", ylabel="loss minus the base's, nats a token", title=name_text(text))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_pareto(reading: SweepReading, text: str) -> Figure:
    """Change of the loss on a further text over that on the corpus's own held-out rows; the front is joined."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    found = []
    for arm in reading.arms:
        adapted, kept = reading.compare_with_base(arm, VALIDATION), reading.compare_with_base(arm, text)
        if adapted is not None and kept is not None:
            found.append((arm, adapted, kept))
    for arm, adapted, kept in found:
        marker, colour, name = SIDES[arm.first.freeze]
        axes.errorbar(
            adapted.value,
            kept.value,
            xerr=_bars([adapted]),
            yerr=_bars([kept]),
            fmt=marker,
            color=colour,
            ecolor=colour,
            elinewidth=0.8,
            alpha=0.85,
            label=name,
        )
        axes.annotate(
            str(arm.first.boundary), (adapted.value, kept.value), xytext=(4, 3), textcoords="offset points", fontsize=7
        )
    front = [found[place] for place in find_front([(adapted.value, kept.value) for _, adapted, kept in found])]
    axes.plot(
        [each[1].value for each in front], [each[2].value for each in front], color=SCORE, linewidth=1, label="front"
    )
    axes.axhline(0, color=MUTED, linewidth=1, linestyle=":")
    axes.set(xlabel="held-out rows of the corpus: loss minus the base's", ylabel=f"{text}: loss minus the base's")
    axes.set_title("adaptation against forgetting")
    _show_once(axes)
    return figure


def draw_cost(reading: SweepReading) -> Figure:
    """Loss over predicted FLOPs; hollow is what was stopped before its last step."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for arm in reading.arms:
        if arm.first.loss is None:
            continue
        marker, colour, name = SIDES[arm.first.freeze]
        stopped = any(each.was_stopped for each in arm.records)
        axes.plot(arm.flops / 1e12, arm.loss, marker, color=colour, fillstyle="none" if stopped else "full", label=name)
        axes.annotate(
            str(arm.first.boundary), (arm.flops / 1e12, arm.loss), xytext=(4, 3), textcoords="offset points", fontsize=7
        )
    axes.set(xlabel="predicted TFLOP of the trial", ylabel="loss, nats a token", title="cost against score")
    axes.margins(0.08)
    _show_once(axes)
    return figure


def _draw_curve(axes: Any, found: Sequence[tuple[Arm, Difference]], **style: Any) -> None:
    axes.errorbar(
        [arm.first.boundary for arm, _ in found],
        [difference.value for _, difference in found],
        yerr=_bars([difference for _, difference in found]),
        capsize=2,
        elinewidth=0.8,
        markersize=4,
        **style,
    )


def _bars(found: Sequence[Difference]) -> list[list[float]]:
    """Lengths below and above, none where there is no interval."""
    return [
        [0.0 if each.interval is None else max(0.0, each.value - each.interval[0]) for each in found],
        [0.0 if each.interval is None else max(0.0, each.interval[1] - each.value) for each in found],
    ]


def _show_once(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    axes.legend(once.values(), once.keys(), frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
