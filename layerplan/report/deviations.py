"""Deviations of each layer before and after a fine-tuning, as SALF's Figures 5 and 6 show them: one violin beside the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from layerplan.aside import writing_aside

COLOURS = {"before": "#c0392b", "after": "#2e6da4"}


def draw_deviations(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], path: Path) -> None:
    """Draws the cosine deviations of a test's prompts at every layer, with their means.

    Args:
        before: By prompt, L + 1 values each, of the base.
        after: The same of the trained model.
        path: PNG file.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(0.32 * len(before[0]) + 2, 3.4), layout="constrained")
    for name, values in (("before", before), ("after", after)):
        columns = np.asarray(values, dtype=float)
        parts = axes.violinplot(
            columns, positions=range(columns.shape[1]), widths=0.85, showmeans=True, showextrema=False
        )
        for body in parts["bodies"]:
            body.set(facecolor=COLOURS[name], alpha=0.4)
        parts["cmeans"].set_color(COLOURS[name])
        axes.plot([], [], color=COLOURS[name], label=name)
    axes.set(xlabel="layer", ylabel="cosine deviation from the label")
    axes.legend(frameon=False)
    with writing_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=110)
    pyplot.close(figure)
