"""Which layers should train? Every plan of a grid, every rival's plan, one model and text: trained, cached, compared.

    OMP_NUM_THREADS=1 python benchmarks/study.py measure --study benchmarks/studies/smollm2_zh.yaml
    OMP_NUM_THREADS=1 python benchmarks/study.py run --study benchmarks/studies/smollm2_zh.yaml
    python benchmarks/study.py run --study benchmarks/studies/smollm2_zh.yaml --device cuda --processes 6
    python benchmarks/study.py tables --study benchmarks/studies/smollm2_zh.yaml > benchmarks/results/study_smollm2_zh.md

`measure` lets the rivals and the tracer measure, before anything is trained; without it there are no arms of rivals. `run`
does what is not done yet and may be stopped at any time: an arm is one file in `runs/studies/<name>/arms`, named after what
it trains and on what, and is written when it is finished. First the learning rate is tuned for a few sizes of the trained
part, then the arms follow, seed by seed. `--max-arms 3` stops after so many. `run` needs torch, transformers and pydantic,
no Ray, and once `rows.npz` is in the study's folder no text. `tables` and `figure` train nothing; `pack` writes what is
finished to `benchmarks/results/studies`, which every action begins from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_torch, find_command
from study_pack import hide_folders, pack, unpack
from study_plan import (
    Arm,
    StudyConfig,
    check_study,
    choose_rates,
    list_arms,
    list_boundaries,
    list_rate_arms,
    load_study,
)
from study_replay import render_replay
from study_tables import (
    correlate_measurement,
    describe_seed_noise,
    render_early,
    render_equal_flops,
    render_opposites,
    render_regret,
    render_spread,
)

from layerplan.artifacts import compute_sha256, write_json
from layerplan.config.corpus import CorpusConfig
from layerplan.errors import LayerplanError
from layerplan.measure.text import read_text
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_measurement import LayerMeasurements
from layerplan.run_folder import MEASUREMENTS_NAME

TEXTS = ("target", "source")
MARGIN = 0.01
"""Nats that decide nothing in a search: the sweep's default."""
COMMON = {
    "target",
    "source",
    "seq_len",
    "held_out_rows",
    "early_rows",
    "steps",
    "rows_per_step",
    "compute_dtype",
    "seed_pool",
    "read_at",
}
"""Fields that every arm depends on."""


class Study:
    """A study's folder and what is known without training."""

    def __init__(self, config: StudyConfig, root: Path) -> None:
        self.config, self.folder = config, root / config.name
        self.model = ModelRef(config.model)
        self.identity, self.shape = self.model.identity(), self.model.shape()
        check_study(config, self.shape.num_layers)
        unpack(self.folder)
        self._inputs: str | None = None

    def read_rows(self) -> dict[str, np.ndarray]:
        """Rows of the target text for every seed with the held-out ones first, and held-out rows of the source text.

        They are read once and kept in the study's folder, which a machine without the text can train from.
        """
        kept = self.folder / "rows.npz"
        self.find_inputs()
        if not kept.exists():
            self._read_texts()
        with np.load(kept) as rows:
            return {text: rows[text] for text in TEXTS}

    def find_inputs(self) -> str:
        """Hash of all that arms have in common: weights, texts, and how an arm is trained."""
        if self._inputs is None:
            kept = self.folder / "inputs.json"
            common = hide_folders(self.config.model_dump(mode="json", include=COMMON))
            now = {"model": self.identity.model_dump(mode="json"), "config": common}
            if kept.exists() and (found := json.loads(kept.read_text()))["now"] == now:
                texts = found["texts"]
            else:
                texts = self._read_texts()
                write_json(kept, {"now": now, "texts": texts})
            self._inputs = compute_sha256({"texts": texts, **now})
        return self._inputs

    def load(self, arm: Arm) -> dict[str, Any] | None:
        """The cached result of an arm, under this study's name for it."""
        path = self.path(arm)
        if not path.exists():
            return None
        return json.loads(path.read_text(encoding="utf-8")) | {"group": arm.group, "label": arm.label}

    def load_done(self) -> list[dict[str, Any]]:
        """The cached results of all arms that are known and done."""
        return [result for arm in self.list_arms() if (result := self.load(arm)) is not None]

    def save(self, arm: Arm, result: dict[str, Any], device: str) -> None:
        """Keeps a finished arm."""
        write_json(self.path(arm), {**vars(arm), **result, "machine": describe_torch(device)})

    def measurements(self) -> LayerMeasurements | None:
        """What the rivals measured, when they did."""
        path = self.folder / "measured" / MEASUREMENTS_NAME
        return LayerMeasurements.load(path) if path.exists() else None

    def tune(self) -> dict[int, float]:
        """Best rate by size, of the sizes whose arms are all done, by the loss on held-out target text."""
        arms = list_rate_arms(self.config, self.identity, self.shape)
        results = [(arm, self.load(arm)) for arm in arms]
        left = {len(arm.layers) for arm, result in results if result is None}
        return choose_rates(
            (len(arm.layers), arm.rate, sum(result["final"]["target"]))
            for arm, result in results
            if result is not None and len(arm.layers) not in left
        )

    def list_arms(self) -> list[Arm]:
        """What is to be trained, as far as it is known: after the rate is tuned and the rivals measured, everything."""
        tuning = list_rate_arms(self.config, self.identity, self.shape)
        rates = self.tune()
        if len(rates) < len(set(self.config.rate_sizes)):
            return tuning
        return tuning + list_arms(self.config, self.identity, self.shape, self.measurements(), rates)

    def _read_texts(self) -> list[str]:
        study = self.config
        counts = (study.held_out_rows + study.steps * study.rows_per_step * study.seed_pool, study.held_out_rows)
        read = [
            read_text(CorpusConfig(sources=[source]), self.model, num_rows=count, seq_len=study.seq_len, seed=0)
            for source, count in zip((study.target, study.source), counts)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(self.folder / "rows.npz", **{text: rows.ids for text, rows in zip(TEXTS, read)})
        return [rows.describe().sha256 for rows in read]

    def path(self, arm: Arm) -> Path:
        """File of a finished arm."""
        return self.folder / "arms" / f"{arm.key(self.find_inputs())}.json"


def run(study: Study, max_arms: int | None, *, device: str = "cpu", processes: int = 1) -> None:
    """Trains what is left, the rate's arms first."""
    from study_train import Benches, Rows, stack_rows

    config = study.config
    rows = Rows(*(stack_rows(ids) for ids in study.read_rows().values()))
    benches = Benches(config.model, config, rows, device=device, processes=processes)
    if not (study.folder / "base.json").exists():
        write_json(study.folder / "base.json", benches.score_base())
    done = 0
    try:
        while left := list({study.path(arm): arm for arm in study.list_arms() if study.load(arm) is None}.values()):
            for arm, result in benches.train(left[: None if max_arms is None else max_arms - done]):
                study.save(arm, result, device)
                done += 1
                print(f"{arm.label}, seed {arm.seed}, rate {arm.rate:g}: arm {done} in this run", file=sys.stderr)
            if done == max_arms:
                break
    finally:
        benches.close()


def measure(study: Study) -> None:
    """Lets the rivals and the tracer measure, as `layerplan measure` does, at the middle of the tried rates."""
    from layerplan.config.run import RunConfig
    from layerplan.pipeline.measure_layers import measure_layers

    values = {
        "name": "measured",
        "storage_path": str(study.folder),
        "model": {"type": "pretrained", "name": study.config.model},
        "corpus": {"sources": [study.config.target.model_dump()]},
        "measure": study.config.measure.model_dump(),
        "train": {"max_steps": study.config.steps, "optimizer": {"learning_rate": study.config.middle_rate}},
    }
    measure_layers(RunConfig.model_validate(values), ())


def render(study: Study) -> str:
    """All tables of a study, from the cache alone."""
    arms, done = study.list_arms(), study.load_done()
    compared = choose_compared(done)
    parts = [
        f"# Study {study.config.name}: {study.identity.name}, {study.shape.num_layers} layers",
        f"{len(done)} of {len(arms)} arms that are known are done ({_describe_plan(study)}). {_describe_machines(done)}",
        f"Command: `{find_command()}`",
        _render_rates(study),
    ]
    for text, what in zip(TEXTS, ("adaptation", "forgetting")):
        parts += [f"## Held-out {text} text: {what}", _render_base(study, text), render_regret(compared, text)]
        parts.append(describe_seed_noise(compared, text))
    parts += ["## At equal FLOPs, target text", render_equal_flops(compared, "target", study.config.flops_shares)]
    for title, show in (
        ("What a measurement chose, and what it spoke against", render_opposites),
        ("Evenly spaced layers, beside as many chosen otherwise", render_spread),
    ):
        if tables := [f"{text.capitalize()} text:\n\n{table}" for text in TEXTS if (table := show(compared, text))]:
            parts += [f"## {title}", *tables]
    parts += ["## Does a measurement rank plans as training does?", _render_correlations(study, compared)]
    found = study.measurements()
    if found is not None and is_grid_whole(study, compared):
        parts += [
            "## A search of this grid by a measurement, replayed",
            f"Target text, margin {MARGIN} nats; the rule is that of `sweep.search: profile`.",
            render_replay(compared, found.measurements, MARGIN),
        ]
    if compared:
        parts += [
            "## How early can one know?",
            *(f"{text.capitalize()} text:\n\n{render_early(compared, text)}" for text in TEXTS),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def choose_compared(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arms that are compared: all but those that only tuned the rate."""
    return [result for result in done if result["group"] != "rate"]


def is_grid_whole(study: Study, arms: Sequence[dict[str, Any]]) -> bool:
    """Whether the grid is finished, on every seed."""
    plans = len(list_boundaries(study.config, study.shape.num_layers)) * len(study.config.sides)
    return sum(arm["group"] == "grid" for arm in arms) == plans * len(study.config.seeds)


def draw(study: Study) -> Path:
    """Draws the finished arms, and returns the figure's path."""
    from study_figures import draw_study

    path = study.folder / f"{study.config.name}.png"
    base = json.loads((study.folder / "base.json").read_text(encoding="utf-8"))
    draw_study(choose_compared(study.load_done()), base, f"{study.config.name}: {study.identity.name}", path)
    return path


def _describe_plan(study: Study) -> str:
    config = study.config
    tokens = f"{config.steps} steps of {config.rows_per_step} rows of {config.seq_len} tokens each"
    return f"planned: {len(config.seeds)} seeds, {tokens}"


def _describe_machines(done: Sequence[dict[str, Any]]) -> str:
    found = {(each["machine"].get("gpu") or each["machine"]["cpu"], each["machine"]["torch"]) for each in done}
    commits = sorted({each["machine"]["commit"] for each in done})
    return f"Trained on {', '.join(f'{where}, torch {torch}' for where, torch in sorted(found))}; commit {', '.join(commits)}."


def _render_rates(study: Study) -> str:
    rates = study.tune()
    return (
        "Learning rate by number of trained layers, tuned on the first seed: "
        + (", ".join(f"{size}: {rate:g}" for size, rate in sorted(rates.items())) or "not tuned yet")
        + "."
    )


def _render_base(study: Study, text: str) -> str:
    path = study.folder / "base.json"
    if not path.exists():
        return ""
    losses = json.loads(path.read_text())[text]
    return f"Loss of the base {sum(losses) / len(losses):.4f}."


def _render_correlations(study: Study, arms: Sequence[dict[str, Any]]) -> str:
    found = study.measurements()
    if found is None:
        return "Nothing was measured yet."
    grid = [arm for arm in arms if arm["group"] == "grid"]
    lines = ["| measurement | target: Spearman, 95 % | source: Spearman, 95 % |", "|---|---:|---:|"]
    for each in found.measurements:
        cells = []
        for text in TEXTS:
            value = correlate_measurement(each.turned_values, grid, text)
            cells.append("-" if value is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*value))
        lines.append(f"| {each.name.replace('_', ' ')} | {' | '.join(cells)} |")
    return (
        "Over plans of the grid with equal numbers of trained layers. These differ in their side alone, so that what is ranked"
        " is mostly which side a measurement prefers: a value near +1 or -1 is one fact about one model. The interval resamples"
        " held-out rows and knows nothing of other models.\n\n" + "\n".join(lines)
    )


def main() -> None:
    """Runs or renders a study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "run", "tables", "figure", "pack"))
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/studies"))
    parser.add_argument("--max-arms", type=int, help="stop after so many")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="that train arms side by side")
    args = parser.parse_args()
    try:
        study = Study(load_study(args.study), args.out)
        if args.action == "measure":
            measure(study)
        elif args.action == "run":
            run(study, args.max_arms, device=args.device, processes=args.processes)
        elif args.action == "figure":
            print(f"figure    {draw(study)}")
        elif args.action == "pack":
            print(f"packed    {pack(study.folder)}")
        else:
            print(render(study), end="")
    except LayerplanError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
