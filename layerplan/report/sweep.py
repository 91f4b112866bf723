"""The page's section on a sweep: which trials won, what else cannot be told from them, and what they cost."""

from __future__ import annotations

import html
from pathlib import Path

from matplotlib.figure import Figure

from layerplan.report.html_parts import embed_svg, render_sentence, render_table
from layerplan.report.sweep_arms import MIN_ROWS, Arm, Difference, SweepReading, read_sweep
from layerplan.report.sweep_figures import draw_boundaries, draw_cost, draw_pareto, name_text
from layerplan.train.judge import VALIDATION

SHOWN = 40
"""Arms in the table; the rest is in `sweep/results.json`."""
_HOW = (
    "Losses are nats a token. Differences from the base are paired, row by row of the held-out text; intervals are 95 %"
    " intervals over rows and over seeds, whose spread is that of all arms with several; where no arm has several, what"
    " another seed would change is not in them. Seeds of one plan are one arm."
)
_ONE_SEED = "of these trainings, one seed each: what another seed would change is not in it"


def render_sweep_section(sweep: Path) -> tuple[str, dict[str, Figure]]:
    """HTML of the section and its figures by name; nothing when no trial has ended.

    Raises:
        LayerplanError: When what a trial left cannot be read.
    """
    reading = read_sweep(sweep)
    if reading is None:
        return "", {}
    figures = build_sweep_figures(reading)
    parts = ["<h2>The sweep</h2>", *map(render_sentence, _say(reading))]
    for name, figure in figures.items():
        parts.append(f"<figure>{embed_svg(figure)}<figcaption class='soft'>{_caption(name)}</figcaption></figure>")
    parts.append(render_table(_headings(reading), [_row(reading, arm) for arm in reading.arms[:SHOWN]]))
    left = len(reading.arms) - SHOWN
    more = f" {left} more are in sweep/results.json." if left > 0 else ""
    parts.append(f'<p class="soft">{html.escape(_HOW + more)}</p>')
    return "".join(parts), figures


def build_sweep_figures(reading: SweepReading) -> dict[str, Figure]:
    """Loss over boundary and the Pareto front for every text, and cost against score."""
    figures = {}
    for text in reading.texts:
        if any(reading.compare_with_base(arm, text) is not None for arm in reading.arms):
            figures[f"sweep_boundary_{text}"] = draw_boundaries(reading, text)
    for text in reading.texts:
        if text != VALIDATION and f"sweep_boundary_{text}" in figures and VALIDATION in reading.base:
            figures[f"sweep_pareto_{text}"] = draw_pareto(reading, text)
    return figures | {"sweep_cost": draw_cost(reading)}


def _say(reading: SweepReading) -> list[str]:
    lines = []
    for text in reading.texts:
        alike = reading.find_alike(text)
        if not alike:
            continue
        best, difference = alike[0], reading.compare_with_base(alike[0], text)
        against = "" if difference is None else f", {_show(difference)} against the base"
        whole = sum(arm.is_whole for arm in reading.arms)
        if difference is not None and difference.interval is None:
            others = f"too few rows to compare it with others (at least {MIN_ROWS})"
        else:
            how = "over rows and seeds" if reading.measure_seeds(text) else f"over rows {_ONE_SEED}"
            others = (
                f"{len(alike) - 1} of {whole - 1} others cannot be told from it (at 5 % over all pairs of arms; {how})"
            )
        lines.append(f"{name_text(text)}: {best.name} is lowest{against}; {others}.")
    stopped = sum(any(each.was_stopped for each in arm.records) for arm in reading.arms)
    return lines + ([f"Stopped before their last step: {stopped} of {len(reading.arms)} arms."] if stopped else [])


def _headings(reading: SweepReading) -> list[str]:
    texts = [f"{name_text(text)}, minus the base's [95 %]" for text in reading.texts]
    return ["arm", "seeds", "steps", "loss", *texts, "TFLOP"]


def _row(reading: SweepReading, arm: Arm) -> list[str]:
    first = arm.first
    steps = f"{first.step:,} of {first.max_steps:,}" if first.was_stopped else f"{first.step:,}"
    differences = [reading.compare_with_base(arm, text) for text in reading.texts]
    shown = ["-" if each is None else _show(each) for each in differences]
    return [arm.name, str(len(arm.records)), steps, f"{arm.loss:.4f}", *shown, f"{arm.flops / 1e12:.3g}"]


def _show(difference: Difference) -> str:
    if difference.interval is None:
        return f"{difference.value:+.4f}"
    low, high = difference.interval
    return f"{difference.value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _caption(name: str) -> str:
    if name.startswith("sweep_boundary_"):
        return "Loss over boundary for what was tried at it; below 0 is better than the base."
    if name.startswith("sweep_pareto_"):
        return (
            "Adaptation against forgetting; numbers are boundaries, the line joins what no other trial beats on both."
        )
    return "Cost against score; numbers are boundaries, hollow was stopped early."
