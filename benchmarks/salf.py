"""The race: fine-tuning methods at equal backward cost, over tasks and seeds, as tables shaped like SALF's own.

    python benchmarks/salf.py jobs/configs/finetune_ceval.yaml --methods salf lift_star lift full --seeds 0 1 2 --out results.md

Each cell is a run of `layerplan finetune` in `--storage`; a run that is finished is read back, so that a race that was cut
goes on. A table has the mean over seeds of each metric with its range, the saving by depth and by FLOPs as counted, and
each method's difference from the first one, tested prompt by prompt over all seeds and corrected for the number of tests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eval.label_scores import NONE, compare_seeds  # noqa: E402
from layerplan.plan.holm import correct_holm  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--methods", nargs="+", required=True, help="name, or name:key=value,... of finetune")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--storage", type=Path, default=Path("runs/race"))
    parser.add_argument("--set", action="append", default=[], help="as of layerplan, for every run")
    parser.add_argument("--out", type=Path, help="file the table is appended to")
    args = parser.parse_args()
    arms = {method: [run(args, method, seed) for seed in args.seeds] for method in args.methods}
    table = render(args.config.stem, arms)
    print(table)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as handle:
            handle.write(table + "\n")


def run(args: argparse.Namespace, method: str, seed: int) -> Path:
    """The folder of a finished run, made when it is not there."""
    name, _, options = method.partition(":")
    label = f"{args.config.stem}-{method.replace(':', '-').replace('=', '_').replace(',', '-')}-{seed}"
    folder = args.storage / label
    if not (folder / "label_cost.json").exists():
        changes = [f"finetune.{each}" for each in options.split(",") if each]
        values = [f"name={label}", f"storage_path={args.storage}", f"seed={seed}", f"finetune.method={name}"]
        flags = [word for value in (*values, *changes, *args.set) for word in ("--set", value)]
        command = [sys.executable, "-m", "layerplan.cli", "finetune", "--config", str(args.config), *flags]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder


def read_predictions(folder: Path) -> tuple[list[int], list[int], int]:
    """Gold classes, predicted ones, and how many classes there are."""
    scored = next(iter(sorted(folder.glob("label_samples/step_*_test.parquet"))))
    records = pq.read_table(scored, columns=["id", "label_id", "predicted_id"]).to_pylist()
    labels = sorted({record["label_id"] for record in records})
    places = {token: place for place, token in enumerate(labels)}
    gold = [places[record["label_id"]] for record in records]
    return gold, [places.get(record["predicted_id"], NONE) for record in records], len(labels)


def render(title: str, arms: dict[str, list[Path]]) -> str:
    """One task's table and the verdicts beside it."""
    lines = [
        f"### {title}",
        "",
        "| method | macro F1 | weighted F1 | accuracy | depth saved | FLOPs saved |",
        "|---|---|---|---|---|---|",
    ]
    for method, folders in arms.items():
        scores = [read_scores(folder) for folder in folders]
        cells = [describe([each[metric] for each in scores]) for metric in ("macro_f1", "weighted_f1", "accuracy")]
        cost = json.loads((folders[0] / "label_cost.json").read_text())["counted"]
        lines.append(f"| {method} | {' | '.join(cells)} | {cost['depth']:.1%} | {cost['flops']:.1%} |")
    return "\n".join([*lines, "", *judge(arms)])


def read_scores(folder: Path) -> dict[str, Any]:
    """Scores of the trained model."""
    models: dict[str, Any] = json.loads((folder / "label_scores.json").read_text())["models"]
    return next(scores for label, scores in models.items() if label != "base")


def describe(values: list[float]) -> str:
    """Mean and range over seeds."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def judge(arms: dict[str, list[Path]]) -> list[str]:
    """Every method against the first, Holm-corrected over all of it."""
    reference, *others = arms
    read = {method: [read_predictions(folder) for folder in folders] for method, folders in arms.items()}
    gold, _, num_classes = read[reference][0]
    predicted = {method: [guess for _, guess, _ in found] for method, found in read.items()}
    verdicts = [
        (method, verdict)
        for method in others
        for verdict in compare_seeds(gold, predicted[reference], predicted[method], num_classes).values()
    ]
    adjusted = correct_holm([verdict.p_value for _, verdict in verdicts])
    return [
        f"- {method}, {verdict.metric.replace('_', ' ')}: {verdict.difference:+.3f}"
        f" [{verdict.interval[0]:+.3f}, {verdict.interval[1]:+.3f}] beside {reference}, p = {p:.3g}"
        for (method, verdict), p in zip(verdicts, adjusted, strict=True)
    ]


if __name__ == "__main__":
    main()
