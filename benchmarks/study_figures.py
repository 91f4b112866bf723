"""A study in one picture: what each plan reaches on target and source text by how many layers it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_tables import find_shared_seeds

Array = NDArray[np.float64]
COLOURS = {"shallow": "#b2182b", "deep": "#2166ac"}
TITLES = {"target": "adaptation: held-out target text", "source": "forgetting: held-out source text"}


def draw_study(arms: Sequence[Mapping[str, Any]], base: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Writes a figure of two panels, one for each text.

    Args:
        arms: Finished arms without those the rate was tuned with; seeds that not every plan has are left out.
        base: Losses of the base on the held-out rows of each text.
        title: Above the figure.
        path: Where it goes; its ending decides the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seeds = find_shared_seeds(arms)
    figure, panels = plt.subplots(1, len(TITLES), figsize=(12, 5), layout="constrained")
    for axes, text in zip(panels, TITLES):
        axes.axhline(float(np.mean(base[text])), color="#999999", linestyle=":", label="base")
        for side, colour in COLOURS.items():
            points = _collect(arms, text, seeds, "grid", side)
            sizes = sorted({size for size, _ in points})
            by_size = [np.array([loss for found, loss in points if found == size]) for size in sizes]
            means = np.array([losses.mean() for losses in by_size])
            spread = [means - [losses.min() for losses in by_size], [losses.max() for losses in by_size] - means]
            axes.errorbar(sizes, means, yerr=spread, color=colour, marker="o", capsize=3, label=f"{side} side trains")
        opposites = [arm for arm in arms if arm["label"].startswith("against ")]
        chosen = [arm for arm in arms if not arm["label"].startswith("against ")]
        points = _collect(chosen, text, seeds, "rival", "")
        _scatter(axes, points, marker="x", colour="#4d9221", label="chosen by a measurement")
        points = _collect(opposites, text, seeds, "rival", "")
        _scatter(axes, points, marker="+", colour="#e08214", label="spoken against by one")
        _scatter(
            axes, _collect(arms, text, seeds, "control", "random"), marker="s", colour="#bbbbbb", label="random layers"
        )
        _scatter(
            axes, _collect(arms, text, seeds, "control", "spread"), marker="D", colour="#7b3294", label="evenly spaced"
        )
        _scatter(axes, _collect(arms, text, seeds, "control", "full"), marker="*", colour="#000000", label="everything")
        axes.set(xlabel="layers that train", ylabel="nats per token", title=TITLES[text])
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{title}, seeds {', '.join(map(str, sorted(seeds)))}; bars: range over seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _collect(
    arms: Sequence[Mapping[str, Any]], text: str, seeds: set[int], group: str, begins: str
) -> list[tuple[int, float]]:
    return [
        (len(arm["layers"]), float(np.mean(arm["final"][text])))
        for arm in arms
        if arm["group"] == group and arm["label"].startswith(begins) and arm["seed"] in seeds
    ]


def _scatter(axes: Any, points: list[tuple[int, float]], *, marker: str, colour: str, label: str) -> None:
    if points:
        axes.scatter(*zip(*points), marker=marker, color=colour, label=label, zorder=3)
