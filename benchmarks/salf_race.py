"""What a race of fine-tuning methods consists of, and its arms run one after the other into one small file of results.

An arm is a method on a task with a seed. Its predictions are kept, one character a prompt, so that tables and tests are made
from the file alone; what is in the file is not run again.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from machine import find_commit, find_cpu, find_versions

from eval.label_scores import NONE
from layerplan.artifacts import hash_file, write_json
from layerplan.config.load import load_config
from layerplan.config.run import RunConfig
from layerplan.models.ref import ModelRef
from layerplan.pipeline.model_options import find_base
from layerplan.plan.row_starts import find_eof_layer
from layerplan.run_folder import RunFolder

CLASSES = "0123456789abcdefghijklmnopqrstuvwxyz"
NO_LABEL = "-"


@dataclass(frozen=True)
class Arm:
    """One training."""

    task: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        """Its place in the file of results."""
        return f"{self.task} | {self.method} | {self.seed}"

    @property
    def folder(self) -> str:
        """Name of its run."""
        name = "".join(letter if letter.isalnum() else "_" for letter in self.method.replace("*", "_star"))
        return f"{self.task}-{name}-{self.seed}"


@dataclass(frozen=True)
class Race:
    """Tasks, methods and seeds, as a file of `benchmarks/races` has them."""

    values: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Race:
        """Reads the file."""
        return cls(yaml.safe_load(path.read_text(encoding="utf-8")))

    def list_arms(self) -> list[Arm]:
        """Seed by seed, method by method."""
        return [
            Arm(task, method, seed)
            for seed in self.values["seeds"]
            for method in self.values["arms"]
            for task in self.values["tasks"]
        ]

    def configure(self, arm: Arm, storage: Path, model: str | None) -> RunConfig:
        """The config of an arm."""
        task, changes = self.values["tasks"][arm.task], self.values["arms"][arm.method]
        uses_lora = any("lora" in change for change in changes)
        own = [
            f"name={arm.folder}",
            f"storage_path={storage}",
            f"seed={arm.seed}",
            f"model.name={model or self.values['model']}",
            f"finetune.task.path={Path(os.environ['LAYERPLAN_DATA']) / task['data']}",
            f"train.optimizer.learning_rate={self.values['rates']['lora' if uses_lora else 'full']}",
            "tracking.backend=jsonl",
        ]
        return load_config(task["config"], [*own, *self.values["changes"], *task["changes"], *changes])


def run_race(race: Race, storage: Path, results: Path, *, model: str | None = None) -> Iterator[str]:
    """Runs what is not in the file of results yet, and yields a line per arm."""
    from salf_bench import Bench  # the tables need no model

    known: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"tasks": {}, "arms": {}}
    bench: Bench | None = None
    for arm in race.list_arms():
        if arm.key in known["arms"]:
            continue
        config = race.configure(arm, storage, model)
        if bench is None:
            ref = find_base(config)
            bench = Bench(ref, storage / "base")
            known["base"] = describe_base(ref)
            known["where"] = {
                "cpu": find_cpu(),
                "commit": find_commit(),
                **find_versions("torch", "peft", "transformers"),
            }
        folder = RunFolder(bench.run(config))
        task, found = collect(folder)
        known["tasks"][arm.task] = task
        known["arms"][arm.key] = found
        write_json(results, known)
        yield f"{arm.key}: macro F1 {found['macro_f1']:.3f}, accuracy {found['accuracy']:.3f}, {found['seconds']['all']:.0f} s"


def describe_base(model: ModelRef) -> dict[str, Any]:
    """Which weights an arm begins from."""
    identity = model.identity()
    weights = sorted(Path(model.name).glob("*.safetensors"))
    return {
        "model_type": identity.model_type,
        "num_layers": identity.num_layers,
        "sha256": hash_file(weights[0]) if weights else None,
    }


def collect(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the tables need of an arm: of its task, and of itself."""
    scores = json.loads(folder.label_scores.read_text())["models"]
    label = next(name for name in scores if name != "base")
    base, trained = scores["base"], scores[label]
    cost = json.loads(folder.label_cost.read_text())
    gold, before = read_predictions(folder.samples_of("base", "test"))
    after = read_predictions(folder.samples_of(label, "test"))[1]
    task = {
        "sha256": trained["task_sha256"],
        "classes": trained["classes"],
        "rows": json.loads(folder.manifest.read_text())["num_rows"],
        "gold": gold,
        "base": before,
        "base_deviation": base["mean_deviation"],
        "base_macro_f1": base["macro_f1"],
        "base_accuracy": base["accuracy"],
    }
    return task, {
        **describe_matches(folder),
        **{metric: trained[metric] for metric in ("accuracy", "macro_f1", "weighted_f1")},
        "predicted": after,
        "deviation": trained["mean_deviation"],
        "planned": cost["planned"],
        "counted": cost["counted"],
        "propagated_rows": cost["propagated_rows"],
        "steps": json.loads(folder.training.read_text())["final_step"],
        "seconds": json.loads((folder.root / "seconds.json").read_text()),
    }


def describe_matches(folder: RunFolder) -> dict[str, Any]:
    """Of a `salf` arm: rows by their own layer, how many start at or above it, and what the layers tell of the label."""
    measured = folder.samples_of("base", "train")
    if not measured.exists():
        return {}
    config = json.loads(folder.config.read_text())["finetune"]
    column = f"deviation_{config['deviation']}"
    records = pq.read_table(measured, columns=["label_id", column]).to_pylist()
    labels, eof = [each["label_id"] for each in records], [find_eof_layer(each[column]) for each in records]
    starts = json.loads(folder.manifest.read_text())["labels"]["start_layers"]
    matched = sum(own <= start for own, start in zip(eof, starts, strict=True))
    return {
        "eof_rows": [eof.count(layer) for layer in range(1 + max(eof))],
        "matched": matched / len(eof),
        "told_by_eof": share_told(labels, eof),
        "told_by_start": share_told(labels, starts),
        "told_by_chance": share_told_by_chance(labels, eof),
    }


def share_told(labels: Sequence[int], layers: Sequence[int]) -> float:
    """Mutual information of label and layer as a share of the label's entropy: 1 when the layer gives the label away."""
    pairs = Counter(zip(labels, layers, strict=True))
    by_label, by_layer, total = Counter(labels), Counter(layers), len(labels)
    entropy = -sum(count / total * math.log(count / total) for count in by_label.values())
    found = sum(
        count / total * math.log(count * total / by_label[label] / by_layer[layer])
        for (label, layer), count in pairs.items()
    )
    return found / entropy


def share_told_by_chance(labels: Sequence[int], layers: Sequence[int], tries: int = 50) -> float:
    """The same of labels in a drawn order, on average."""
    rng = np.random.default_rng(0)
    return float(np.mean([share_told(rng.permutation(labels).tolist(), layers) for _ in range(tries)]))


def read_predictions(path: Path) -> tuple[str, str]:
    """Gold and predicted classes of a measured test, one character a prompt."""
    records = pq.read_table(path, columns=["label_id", "predicted_id"]).to_pylist()
    places = {token: CLASSES[place] for place, token in enumerate(sorted({each["label_id"] for each in records}))}
    gold = "".join(places[each["label_id"]] for each in records)
    return gold, "".join(places.get(each["predicted_id"], NO_LABEL) for each in records)


def decode(text: str) -> list[int]:
    """Classes of a line of characters."""
    return [NONE if letter == NO_LABEL else CLASSES.index(letter) for letter in text]
