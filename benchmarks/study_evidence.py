"""What finished studies found, as data for `plan.type: recommended`: made from the packed arms alone, no model needed.

python benchmarks/study_evidence.py > layerplan/plan/study_evidence.json
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_pack import PACKED
from study_plan import StudyConfig, choose_rates, find_rate, list_boundaries, load_study
from study_tables import measure_seed_noise

from layerplan.artifacts import render_json
from layerplan.plan.layer_measurement import LayerMeasurement
from layerplan.plan.selectors import space_layers
from layerplan.plan.study_evidence import StudiedPlan, Study, StudyEvidence
from layerplan.run_folder import MEASUREMENTS_NAME

STUDIES = Path(__file__).parent / "studies"
COMMAND = "python benchmarks/study_evidence.py > layerplan/plan/study_evidence.json"
TEXTS = ("target", "source")
Layers = tuple[int, ...]


class Packed:
    """A study's config and its finished arms."""

    def __init__(self, config: StudyConfig, content: Mapping[str, Any]) -> None:
        self.config = config
        self.arms = [value for name, value in content.items() if name.startswith("arms/")]
        self.model: dict[str, Any] = content["inputs.json"]["now"]["model"]
        self.base: dict[str, list[float]] = content["base.json"]
        self.num_layers = int(self.model["num_layers"])
        found = content.get(f"measured/{MEASUREMENTS_NAME}", {"measurements": []})
        self.measured = [LayerMeasurement.model_validate(each) for each in found["measurements"]]
        self.rates = self._tune()

    def _tune(self) -> dict[int, float]:
        """Best rate by size, as `study.py` tunes it: on the first seed, over both sides, by held-out target text."""
        return choose_rates(
            (len(arm["layers"]), arm["rate"], sum(arm["final"]["target"])) for arm in self.arms if self._tunes(arm)
        )

    def _tunes(self, arm: Mapping[str, Any]) -> bool:
        size, layers = len(arm["layers"]), tuple(arm["layers"])
        is_side = layers in (tuple(range(size)), tuple(range(self.num_layers - size, self.num_layers)))
        is_tried = size in self.config.rate_sizes and arm["rate"] in self.config.rates
        return is_side and is_tried and arm["seed"] == self.config.seeds[0] and not arm["trains_everything"]

    def find(self, layers: Sequence[int], *, trains_everything: bool = False) -> list[dict[str, Any]]:
        """The arms of these layers at their tuned rate, one for each seed that is done."""
        rate = find_rate(self.rates, len(layers))
        return [
            arm
            for arm in self.arms
            if arm["layers"] == list(layers) and arm["trains_everything"] == trains_everything and arm["rate"] == rate
        ]

    def list_plans(self) -> Iterator[tuple[str, Layers]]:
        """Everything, both sides of every boundary of the grid, and evenly spaced layers."""
        yield "full", tuple(range(self.num_layers))
        for boundary in list_boundaries(self.config, self.num_layers):
            for side in self.config.sides:
                shallow, deep = tuple(range(boundary)), tuple(range(boundary, self.num_layers))
                yield side, shallow if side == "shallow" else deep
        for count in self.config.spread_counts:
            yield "spread", space_layers(count, self.num_layers)

    def list_rivals(self) -> Iterator[tuple[str, Layers]]:
        """What each measurement chose at equal numbers of layers."""
        for each in self.measured:
            for count in self.config.layer_counts:
                yield each.name, tuple(sorted(each.rank()[:count]))


def describe(packed: Packed) -> Study:
    """The study as evidence; without its plans while it is not finished."""
    config = packed.config
    plans = [
        (name, layers, packed.find(layers, trains_everything=name == "full")) for name, layers in packed.list_plans()
    ]
    rivals = [(name, layers, packed.find(layers)) for name, layers in packed.list_rivals()]
    sides = [arms for name, _, arms in plans if name in config.sides]
    wanted = len(config.seeds)
    done = sum(min(wanted, len(arms)) for _, _, arms in (*plans, *rivals))
    planned = wanted * (len(plans) + len(packed.measured) * len(config.layer_counts))
    is_finished = done == planned
    return Study(
        name=config.name,
        model_type=packed.model["model_type"],
        num_layers=packed.num_layers,
        target=config.target.path,
        source=config.source.path,
        seeds=config.seeds,
        held_out_rows=config.held_out_rows,
        tokens=config.steps * config.rows_per_step * config.seq_len,
        seq_len=config.seq_len,
        commits=sorted({arm["machine"]["commit"] for arm in packed.arms}),
        planned=planned,
        done=done,
        base={text: float(np.mean(packed.base[text])) for text in TEXTS},
        noise={text: _measure_noise(sides, text) for text in TEXTS} if is_finished else {},
        plans=[_describe_plan(*plan) for plan in plans] if is_finished else [],
        rivals=[_describe_plan(*plan) for plan in rivals] if is_finished else [],
    )


def _describe_plan(name: str, layers: Layers, arms: Sequence[Mapping[str, Any]]) -> StudiedPlan:
    return StudiedPlan(
        trains=name,
        num_trained=len(layers),
        flops_share=arms[0]["flops_share"],
        rate=arms[0]["rate"],
        loss={text: float(np.mean([np.mean(arm["final"][text]) for arm in arms])) for text in TEXTS},
    )


def _measure_noise(plans: Sequence[Sequence[Mapping[str, Any]]], text: str) -> float:
    return measure_seed_noise(
        np.array([[np.mean(arm["final"][text]) for arm in sorted(arms, key=lambda arm: arm["seed"])] for arms in plans])
    )


def collect() -> StudyEvidence:
    """Every packed study that has a config here."""
    found = []
    for path in sorted(STUDIES.glob("*.yaml")):
        file = PACKED / f"{path.stem}.json.gz"
        if file.exists():
            content = json.loads(gzip.decompress(file.read_bytes()))
            found.append(describe(Packed(load_study(path, expand=False), content)))
    return StudyEvidence(command=COMMAND, studies=found)


if __name__ == "__main__":
    print(render_json(collect().model_dump(mode="json")), end="")
