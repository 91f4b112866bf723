"""How long must a pilot be? Its ranking of layers after each step, beside its last one, another seed's, and what plans reached.

    OMP_NUM_THREADS=1 python benchmarks/study_pilot.py --study benchmarks/studies/smollm2_zh.yaml

The pilot runs for as many steps as an arm of the study has, on the rows of the study's own seeds, at the middle of the tried
rates; what it says after n steps is the mean of its first n. No arm is trained: those that are finished are looked up.
"""

from __future__ import annotations

import argparse
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_torch, find_command
from numpy.typing import NDArray
from scipy.stats import spearmanr
from study import Study, choose_compared
from study_plan import load_study
from study_tables import correlate_measurement
from tqdm import tqdm

from layerplan.config.train import OptimizerConfig
from layerplan.errors import LayerplanError
from layerplan.measure.pilot import run_pilot

LENGTHS = (1, 2, 4, 5, 10, 15)


def measure(study: Study) -> dict[int, NDArray[np.float64]]:
    """Nats that each layer saved, (steps, layers), by seed."""
    config = study.config
    rows = torch.as_tensor(study.read_rows()["target"], dtype=torch.int64)
    optimizer, found = OptimizerConfig(learning_rate=config.middle_rate), {}
    for seed in config.seeds:
        steps = tqdm(rows[config.find_rows(seed)].split(config.rows_per_step), desc=f"pilot, seed {seed}")
        found[seed] = np.array(run_pilot(study.model.load(), steps, optimizer))
    return found


def render(found: dict[int, NDArray[np.float64]], grid: list[dict[str, Any]]) -> str:
    """A row for each length: how well it agrees with the whole pilot, with other seeds, and with what was reached."""
    steps = len(next(iter(found.values())))
    lines = [
        "| steps | share | with its own last ranking | between seeds | with what plans reached, by seed |",
        "|---:|---:|---:|---:|---|",
    ]
    for length in [*(length for length in LENGTHS if length < steps), steps]:
        means = {seed: values[:length].mean(0) for seed, values in found.items()}
        own = [_correlate(mean, found[seed].mean(0)) for seed, mean in means.items()]
        others = [_correlate(means[one], means[other]) for one, other in combinations(means, 2)]
        reached = [correlate_measurement(mean.tolist(), grid, "target") for mean in means.values()]
        lines.append(
            f"| {length} | {length / steps:.0%} | {_span(own)} | {_span(others)} |"
            f" {', '.join('-' if value is None else f'{value[0]:+.2f}' for value in reached)} |"
        )
    return "\n".join(lines)


def _correlate(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(spearmanr(one, other).statistic)


def _span(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:+.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:+.2f} to {high:+.2f}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    args = parser.parse_args()
    try:
        study = Study(load_study(args.study), args.out)
        grid = [arm for arm in choose_compared(study.load_done()) if arm["group"] == "grid"]
        machine = describe_torch("cpu")
        where = f"{machine['cpu']}, torch {machine['torch']}, commit {machine['commit']}"
        print(f"## {study.config.name}\n\n{where}: `{find_command()}`\n")
        print(render(measure(study), grid))
    except LayerplanError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
