"""What a study trains: its config, and the arms that follow from it. Nothing here trains or loads a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from layerplan.artifacts import compute_sha256
from layerplan.config.base import StrictModel
from layerplan.config.corpus import SourceConfig
from layerplan.config.measure import MeasureConfig
from layerplan.config.plan import ExplicitPlanConfig, FullPlanConfig, PlanConfig, RandomPlanConfig, SpreadPlanConfig
from layerplan.errors import ConfigError, PlanError
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_measurement import LayerMeasurement, LayerMeasurements
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.measured import count_affordable
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan

Side = Literal["shallow", "deep"]


class StudyConfig(StrictModel):
    """One model continued on one text, by every plan of a grid and of every measurement."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Of the study and its folder."""
    model: str
    """Folder or hub id of the base. Environment variables are expanded anywhere in the file."""
    target: SourceConfig
    """Text that is trained on; its held-out rows measure adaptation."""
    source: SourceConfig
    """Text the base knows; its held-out rows measure forgetting."""
    seq_len: int = Field(default=256, ge=16)
    """Tokens of a row."""
    held_out_rows: int = Field(default=24, ge=2)
    """Rows of each text that are scored, the same in every arm: comparisons are paired by them."""
    early_rows: int = Field(default=8, ge=2)
    """The first of them that are scored before the end too."""
    steps: int = Field(default=20, ge=2)
    """Optimizer steps of an arm."""
    rows_per_step: int = Field(default=4, ge=1)
    """Rows of a step."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of products, in training and scoring; weights and optimizer are float32."""
    seeds: list[int] = Field(default=[0, 1], min_length=1)
    """Each draws its own rows and their order."""
    seed_pool: int = Field(default=5, ge=1)
    """Seeds that text is set aside for, so that a further seed leaves the arms of the others as they are."""
    boundaries: Literal["all"] | list[int]
    """Layers [0, boundary) are shallow."""
    sides: list[Side] = ["shallow", "deep"]
    """Which side of each boundary trains."""
    rivals: bool = True
    """Train the layers that each measurement speaks for, those of the tracer among them."""
    controls: list[Literal["full", "random"]] = ["full", "random"]
    """Plans without a measurement; `random` draws as many layers as half of the model, one draw for each seed."""
    spread_counts: list[int] = []
    """Numbers of evenly spaced layers that train, which no measurement chose."""
    flops_shares: list[float] = [0.6, 0.8]
    """Rivals train as many layers as cost at most this share of training everything: pairs of equal FLOPs."""
    layer_counts: list[int] = []
    """Rivals train as many layers too: pairs of equal layers. What they speak against most is trained beside it."""
    rates: list[float] = Field(default=[1.5e-4, 3e-4, 6e-4, 1.2e-3], min_length=1)
    """Learning rates that are tried, on the first seed, for each of `rate_sizes`; rivals measure at the middle one."""
    rate_sizes: list[int] = Field(min_length=1)
    """Numbers of trained layers the rate is tuned for; others take that of the nearest in the logarithm."""
    read_at: list[float] = [0.05, 0.1, 0.25, 0.5]
    """Shares of the steps after which an arm is scored on the early rows."""
    measure: MeasureConfig = MeasureConfig()
    """How rivals measure."""

    @property
    def middle_rate(self) -> float:
        """At which rivals measure."""
        return sorted(self.rates)[len(self.rates) // 2]

    def find_rows(self, seed: int) -> slice:
        """A seed's training rows among those of the target text."""
        per_seed = self.steps * self.rows_per_step
        first = self.held_out_rows + seed * per_seed
        return slice(first, first + per_seed)


@dataclass(frozen=True)
class Arm:
    """One training."""

    group: Literal["rate", "grid", "rival", "control"]
    label: str
    """Of the plan, the same for every seed and rate."""
    layers: tuple[int, ...]
    """Layers that train."""
    trains_everything: bool
    """Embeddings, norm and head too."""
    flops_share: float
    """Of training everything."""
    seed: int
    rate: float
    steps: int

    def key(self, inputs: str) -> str:
        """Name of its cached result: of what it trains and on what, not of why, so that equal arms are trained once."""
        content = {name: value for name, value in vars(self).items() if name not in ("group", "label")}
        return compute_sha256({"inputs": inputs, **content, "layers": list(self.layers)})[:16]


def load_study(path: Path, *, expand: bool = True) -> StudyConfig:
    """Reads a study, with environment variables expanded if asked to; raises `ConfigError` with one line per fault."""
    try:
        text = path.read_text(encoding="utf-8")
        return StudyConfig.model_validate(yaml.safe_load(os.path.expandvars(text) if expand else text))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def check_study(study: StudyConfig, num_layers: int) -> None:
    """Raises `ConfigError` for boundaries and sizes that the model does not have, and seeds without text."""
    wrong = [k for k in list_boundaries(study, num_layers) if not 1 <= k < num_layers]
    if wrong:
        raise ConfigError(f"boundaries={wrong}: must lie in 1..{num_layers - 1} for a model of {num_layers} layers")
    wrong = [seed for seed in study.seeds if not 0 <= seed < study.seed_pool]
    if wrong:
        raise ConfigError(f"seeds={wrong}: must lie in 0..{study.seed_pool - 1}, for which seed_pool sets text aside")
    wrong = [size for size in study.rate_sizes if not 1 <= size <= num_layers]
    if wrong:
        raise ConfigError(f"rate_sizes={wrong}: must lie in 1..{num_layers}")
    for name in ("layer_counts", "spread_counts"):
        wrong = [count for count in getattr(study, name) if not 1 <= count < num_layers]
        if wrong:
            raise ConfigError(f"{name}={wrong}: must lie in 1..{num_layers - 1}")


def list_boundaries(study: StudyConfig, num_layers: int) -> list[int]:
    """The boundaries of the grid."""
    return [*range(1, num_layers)] if study.boundaries == "all" else study.boundaries


def list_rate_arms(study: StudyConfig, model: ModelIdentity, shape: ModelShape) -> list[Arm]:
    """Both sides of the tuned sizes, at every rate, on the first seed."""
    arms = []
    for size in study.rate_sizes:
        sides = study.sides if size < shape.num_layers else study.sides[:1]
        for side in sides:
            plan = _explicit(model, shape, _list_side(side, size, shape.num_layers), study)
            arms += [_make_arm("rate", f"{side} {size}", plan, study.seeds[0], rate, study) for rate in study.rates]
    return arms


def list_arms(
    study: StudyConfig,
    model: ModelIdentity,
    shape: ModelShape,
    measurements: LayerMeasurements | None,
    rates: dict[int, float],
) -> list[Arm]:
    """Every arm of the study but those the rate is tuned with, the first seed's first.

    Args:
        study: The study.
        model: Its model.
        shape: The model's sizes.
        measurements: What its rivals measured; None leaves their arms out.
        rates: Tuned rate by number of trained layers.
    """
    grid: list[tuple[Any, str, FreezePlan]] = []
    for boundary in list_boundaries(study, shape.num_layers):
        for side in study.sides:
            size = boundary if side == "shallow" else shape.num_layers - boundary
            plan = _explicit(model, shape, _list_side(side, size, shape.num_layers), study)
            grid.append(("grid", f"{side} of {boundary}", plan))
    for measurement in measurements.measurements if measurements is not None and study.rivals else []:
        grid += [
            ("rival", label, _explicit(model, shape, layers, study))
            for label, layers in choose_layers(measurement, study, lambda layers: _price(model, shape, layers, study))
        ]
    grid += [
        ("control", f"spread, {count} layers", _plan(SpreadPlanConfig(k=count), model, shape, study))
        for count in study.spread_counts
    ]
    arms: list[Arm] = []
    for seed in study.seeds:
        controls = [("control", name, _control(name, model, shape, study, seed)) for name in study.controls]
        arms += [
            _make_arm(group, label, plan, seed, find_rate(rates, len(plan.trainable_layers)), study)
            for group, label, plan in (*grid, *controls)
        ]
    return arms


def choose_layers(
    measurement: LayerMeasurement, study: StudyConfig, price: Callable[[Sequence[int]], float]
) -> list[tuple[str, list[int]]]:
    """What a measurement trains at each pairing, by label; a share of FLOPs that no layer fits has none."""
    order, name = measurement.rank(), measurement.name
    chosen = []
    for share in study.flops_shares:
        if (count := count_affordable(order, price, share)) is not None:
            chosen.append((f"{name} at {share:.0%}", sorted(order[:count])))
    for count in study.layer_counts:
        chosen.append((f"{name}, {count} layers", sorted(order[:count])))
        chosen.append((f"against {name}, {count} layers", sorted(measurement.rank(from_worst=True)[:count])))
    return chosen


def choose_rates(tried: Iterable[tuple[int, float, float]]) -> dict[int, float]:
    """Best rate by number of trained layers: that of the lowest sum over both sides.

    Args:
        tried: Number of layers, rate and loss of every arm that the rate was tuned with.
    """
    sums: dict[int, dict[float, float]] = {}
    for size, rate, loss in tried:
        by_rate = sums.setdefault(size, {})
        by_rate[rate] = by_rate.get(rate, 0.0) + loss
    return {size: min(by_rate, key=lambda rate: by_rate[rate]) for size, by_rate in sums.items()}


def find_rate(rates: dict[int, float], num_layers: int) -> float:
    """The rate of the tuned size nearest in the logarithm, the smaller on a tie."""
    return rates[min(sorted(rates), key=lambda size: abs(log(size) - log(max(1, num_layers))))]


def _make_arm(group: Any, label: str, plan: FreezePlan, seed: int, rate: float, study: StudyConfig) -> Arm:
    assert plan.predicted_cost is not None, "plans made by a policy have a cost"
    share = plan.predicted_cost.flops_share
    return Arm(group, label, plan.trainable_layers, plan.trains_everything, share, seed, rate, study.steps)


def _list_side(side: Side, size: int, num_layers: int) -> range:
    return range(size) if side == "shallow" else range(num_layers - size, num_layers)


def _explicit(model: ModelIdentity, shape: ModelShape, layers: Sequence[int], study: StudyConfig) -> FreezePlan:
    return _plan(ExplicitPlanConfig(trainable=[*layers]), model, shape, study)


def _price(model: ModelIdentity, shape: ModelShape, layers: Sequence[int], study: StudyConfig) -> float:
    cost = _explicit(model, shape, layers, study).predicted_cost
    assert cost is not None, "plans made by a policy have a cost"
    return cost.flops_share


def _control(name: str, model: ModelIdentity, shape: ModelShape, study: StudyConfig, seed: int) -> FreezePlan:
    if name == "full":
        return _plan(FullPlanConfig(), model, shape, study)
    return _plan(RandomPlanConfig(k=max(1, shape.num_layers // 2), seed=seed), model, shape, study)


def _plan(config: PlanConfig, model: ModelIdentity, shape: ModelShape, study: StudyConfig) -> FreezePlan:
    try:
        return make_plan(config, model=model, shape=shape, seq_len=study.seq_len)
    except PlanError as error:
        raise ConfigError(str(error)) from None
