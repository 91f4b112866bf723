"""The trials a sweep may run: every combination of boundary, side, ends, learning rate and seed, each with its name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from layerplan.config.plan import PlanOptions
from layerplan.config.sweep import Side, SweepConfig
from layerplan.plan.selectors import space_layers
from layerplan.run_folder import BOUNDARY_PREFIX

Value = TypeVar("Value")


@dataclass(frozen=True)
class Point:
    """One trial of the space."""

    boundary: int
    freeze: Side
    ends: PlanOptions
    learning_rate: float
    seed: int
    name: str
    """Folder of the trial below the sweep, and its name everywhere: what differs from the run's own values is in it, so a
    trial keeps its name when the space grows."""

    def list_trained(self, num_layers: int) -> tuple[int, ...]:
        """The layers that train."""
        if self.freeze == "spread":
            return space_layers(num_layers - self.boundary, num_layers)
        return tuple(range(self.boundary) if self.freeze == "deep" else range(self.boundary, num_layers))

    @property
    def setting(self) -> tuple[object, ...]:
        """All but the boundary and the seed: trials that share it lie on one curve."""
        return self.freeze, self.ends.model_dump_json(), self.learning_rate


@dataclass(frozen=True)
class OwnValues:
    """What the run's config says without the sweep."""

    ends: PlanOptions
    learning_rate: float
    seed: int


def list_points(sweep: SweepConfig, boundaries: Sequence[int], own: OwnValues) -> list[Point]:
    """Every trial of the space, each once, boundary by boundary, those of one boundary by side, ends, rate and seed.

    Args:
        sweep: What is tried.
        boundaries: The boundaries of this model, distinct.
        own: The run's values, for what the sweep leaves open.
    """
    dimensions = (
        boundaries,
        _distinct(sweep.freeze),
        _distinct([own.ends] if sweep.ends is None else sweep.ends),
        _distinct([own.learning_rate] if sweep.learning_rates is None else sweep.learning_rates),
        _distinct([own.seed] if sweep.seeds is None else sweep.seeds),
    )
    return [
        Point(boundary, freeze, ends, rate, seed, _name(boundary, freeze, ends, rate, seed, own))
        for boundary, freeze, ends, rate, seed in itertools.product(*dimensions)
    ]


def describe_ends(ends: PlanOptions) -> str:
    """Which ends train, in a word or some."""
    trained = [name for name in ("embeddings", "final_norm", "lm_head") if getattr(ends, f"train_{name}")]
    tied = [] if ends.tied is None else [f"tied_{ends.tied}"]
    return "+".join([*trained, *tied]) or "ends_frozen"


def _name(boundary: int, freeze: Side, ends: PlanOptions, rate: float, seed: int, own: OwnValues) -> str:
    parts = [f"{BOUNDARY_PREFIX}{boundary:02d}"]
    parts += [] if freeze == "deep" else [freeze]
    parts += [] if ends == own.ends else [describe_ends(ends)]
    parts += [] if rate == own.learning_rate else [f"lr{rate!r}"]
    parts += [] if seed == own.seed else [f"seed{seed}"]
    return "_".join(parts)


def _distinct(values: Sequence[Value]) -> list[Value]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
