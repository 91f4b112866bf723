"""From cached arms to tables: regret of every plan with its interval, rank correlations, and how early one can know.

Every arm is scored on the same held-out rows, so two plans are compared row by row, averaged over the seeds they share.
Intervals resample rows; p comes from flipping the signs of the rows' differences, corrected by Holm's method over the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from layerplan.plan.holm import correct_holm

Array = NDArray[np.float64]
NUM_RESAMPLES = 9999
SIGNIFICANT = 0.05


def collect(arms: Sequence[Mapping[str, Any]], text: str) -> dict[str, Array]:
    """Losses by label, averaged over the seeds that every label has: (rows,) each; those of fewer seeds are left out."""
    seeds = find_shared_seeds(arms)
    found: dict[str, dict[int, Array]] = {}
    for arm in arms:
        if arm["seed"] in seeds:
            found.setdefault(arm["label"], {})[arm["seed"]] = np.asarray(arm["final"][text], dtype=np.float64)
    return {label: np.mean(list(by_seed.values()), axis=0) for label, by_seed in found.items() if set(by_seed) == seeds}


def find_shared_seeds(arms: Sequence[Mapping[str, Any]]) -> set[int]:
    """Seeds of the label with the most of them; labels without all of these are not compared yet."""
    by_label: dict[str, set[int]] = {}
    for arm in arms:
        by_label.setdefault(arm["label"], set()).add(arm["seed"])
    return max(by_label.values(), key=len, default=set())


def compare(one: Array, other: Array, seed: int = 0) -> tuple[float, float, float, float]:
    """Mean difference of paired rows, its 95 % interval, and the two-sided p of no difference."""
    gaps = one - other
    rng = np.random.default_rng(seed)
    means = gaps[rng.integers(len(gaps), size=(NUM_RESAMPLES, len(gaps)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    flipped = np.abs((gaps * rng.choice([-1.0, 1.0], size=(NUM_RESAMPLES, len(gaps)))).mean(1))
    p = (1 + (flipped >= abs(gaps.mean()) - 1e-12).sum()) / (1 + NUM_RESAMPLES)
    return float(gaps.mean()), float(low), float(high), float(p)


def render_regret(arms: Sequence[Mapping[str, Any]], text: str) -> str:
    """Table of a text: loss, regret against the best label with interval and corrected p, FLOPs, best first."""
    losses = collect(arms, text)
    if len(losses) < 2:
        return f"Fewer than two plans are done on {text}."
    first = {arm["label"]: arm for arm in reversed(arms)}
    order = sorted(losses, key=lambda label: float(losses[label].mean()))
    best = order[0]
    spread = float(losses[order[-1]].mean() - losses[best].mean())
    compared = {label: compare(losses[label], losses[best]) for label in order[1:]}
    p_values = dict(zip(compared, correct_holm([each[3] for each in compared.values()])))
    lines = [
        "| plan | layers | FLOPs of full | rate | loss | regret, nats | 95 % | of the spread | p |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for label in order:
        arm, loss = first[label], float(losses[label].mean())
        gap, low, high, _ = compared.get(label, (0.0, 0.0, 0.0, 1.0))
        cells = (
            "| 0 | | 0 % | |"
            if label == best
            else (f"| {gap:.4f} | {low:.4f} to {high:.4f} | {gap / spread:.0%} | {p_values[label]:.2g} |")
        )
        lines.append(
            f"| {label} | {len(arm['layers'])} | {arm['flops_share']:.0%} | {arm['rate']:.2g} | {loss:.4f} {cells}"
        )
    alike = [label for label in compared if p_values[label] >= SIGNIFICANT]
    seeds = sorted(find_shared_seeds(arms))
    told = f"{len(alike)} of {len(compared)} other plans are not told from the best"
    lines += ["", f"Seeds {', '.join(map(str, seeds))}; {len(losses[best])} rows; {told}."]
    return "\n".join(lines)


def describe_seed_noise(arms: Sequence[Mapping[str, Any]], text: str) -> str:
    """How far seeds move a plan's loss beyond what they move all plans of the grid: one standard deviation."""
    seeds = sorted(find_shared_seeds(arms))
    by_label: dict[str, dict[int, float]] = {}
    for arm in arms:
        if arm["group"] == "grid" and arm["seed"] in seeds:
            by_label.setdefault(arm["label"], {})[arm["seed"]] = float(np.mean(arm["final"][text]))
    losses = np.array([[found[seed] for seed in seeds] for found in by_label.values() if set(found) == set(seeds)])
    if losses.size == 0 or min(losses.shape) < 2:
        return ""
    noise = measure_seed_noise(losses)
    return (
        f"From seed to seed a plan's loss moves by {noise:.4f} nats (standard deviation, beyond what all plans share)."
    )


def measure_seed_noise(losses: Array) -> float:
    """What a seed moves a plan's loss by beyond what it moves all of them: one standard deviation.

    Args:
        losses: By plan and seed, at least two of each.
    """
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    return float(np.sqrt((left**2).sum() / ((losses.shape[0] - 1) * (losses.shape[1] - 1))))


def render_equal_flops(arms: Sequence[Mapping[str, Any]], text: str, shares: Sequence[float]) -> str:
    """Regret of rivals among plans that cost at most the same share: the best of each budget in place of the best of all."""
    parts = []
    for share in shares:
        inside = [arm for arm in arms if arm["flops_share"] <= share + 1e-9]
        parts.append(
            f"At most {share:.0%} of the FLOPs of training everything (pairs of equal FLOPs):\n\n{render_regret(inside, text)}"
        )
    return "\n\n".join(parts)


def correlate_measurement(
    values: Sequence[float], arms: Sequence[Mapping[str, Any]], text: str
) -> tuple[float, float, float] | None:
    """Spearman correlation over plans of equal numbers of layers between what a measurement says and what was reached.

    What it says of a plan is the mean rank share of the layers it trains, above or below the mean of the other plans with as many
    layers; what was reached is the loss below theirs. The interval resamples the held-out rows.
    """
    losses = collect([arm for arm in arms if not arm["trains_everything"]], text)
    layers = {arm["label"]: tuple(arm["layers"]) for arm in arms}
    ranks = np.argsort(np.argsort(values)) / (len(values) - 1)
    sizes = {label: len(layers[label]) for label in losses}
    labels = [label for label in losses if sum(size == sizes[label] for size in sizes.values()) > 1]
    if len(labels) < 4:
        return None
    said = np.array([ranks[list(layers[label])].mean() for label in labels])
    groups = np.array([sizes[label] for label in labels])
    rows = np.stack([losses[label] for label in labels])
    said = _centre(said, groups)
    rng = np.random.default_rng(0)
    drawn = rng.integers(rows.shape[1], size=(999, rows.shape[1]))
    found = [float(spearmanr(said, -_centre(rows[:, pick].mean(1), groups)).statistic) for pick in drawn]
    whole = float(spearmanr(said, -_centre(rows.mean(1), groups)).statistic)
    low, high = np.nanquantile(found, [0.025, 0.975])
    return whole, float(low), float(high)


def render_early(arms: Sequence[Mapping[str, Any]], text: str) -> str:
    """Rank correlation of the plans after some steps with the plans at the end."""
    reads = sorted({int(step) for arm in arms for step in arm["early"]})
    lines = ["| steps | share | plans | rank correlation with the end |", "|---:|---:|---:|---:|"]
    for step in reads:
        pairs = [
            (float(np.mean(arm["early"][str(step)][text])), float(np.mean(arm["final"][text])))
            for arm in arms
            if str(step) in arm["early"]
        ]
        if len(pairs) > 2:
            statistic = float(spearmanr(*zip(*pairs)).statistic)
            lines.append(f"| {step} | {step / arms[0]['steps']:.0%} | {len(pairs)} | {statistic:+.2f} |")
    return "\n".join(lines)


def _centre(values: Array, groups: NDArray[np.int64]) -> Array:
    """Values less the mean of their group."""
    return values - np.array([values[groups == group].mean() for group in groups])


def render_opposites(arms: Sequence[Mapping[str, Any]], text: str) -> str:
    """Table of what each measurement chose beside as many layers that it speaks against, corrected over its rows."""
    losses = collect(arms, text)
    pairs = [(label, f"against {label}") for label in losses if f"against {label}" in losses]
    heads = [(label.replace("_", " "),) for label, _ in pairs]
    return _render_pairs(losses, pairs, ("chosen by", "loss", "of the opposite"), heads)


def render_spread(arms: Sequence[Mapping[str, Any]], text: str) -> str:
    """Table of evenly spaced layers beside every other choice of as many, corrected over its rows."""
    losses = collect(arms, text)
    first = {arm["label"]: arm for arm in reversed(arms) if arm["label"] in losses}
    pairs = [
        (spread, label)
        for spread in first
        if spread.startswith("spread, ")
        for label in sorted(losses, key=lambda label: float(losses[label].mean()))
        if len(first[label]["layers"]) == len(first[spread]["layers"])
        and not label.startswith(("against ", "spread, "))
    ]
    heads = [(str(len(first[label]["layers"])), label.replace("_", " ")) for _, label in pairs]
    return _render_pairs(losses, pairs, ("layers", "beside", "loss, evenly spaced", "loss, beside"), heads)


def _render_pairs(
    losses: Mapping[str, Array], pairs: Sequence[tuple[str, str]], titles: Sequence[str], heads: Sequence[Sequence[str]]
) -> str:
    """One row for each pair: its heads, both losses, their paired difference, interval and p; nothing without pairs."""
    if not pairs:
        return ""
    compared = [compare(losses[one], losses[other]) for one, other in pairs]
    p_values = correct_holm([each[3] for each in compared])
    lines = [
        f"| {' | '.join(titles)} | difference | 95 % | p |",
        f"|{'---|' * len(heads[0])}{'---:|' * (len(titles) - len(heads[0]))}---:|---|---:|",
    ]
    for (one, other), head, (gap, low, high, _), p in zip(pairs, heads, compared, p_values, strict=True):
        means = f"{losses[one].mean():.4f} | {losses[other].mean():.4f}"
        lines.append(f"| {' | '.join(head)} | {means} | {gap:+.4f} | {low:+.4f} to {high:+.4f} | {p:.2g} |")
    return "\n".join(lines)
