"""What the training loop is given: the objects it works on, and what surrounds it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.models.freezing import AppliedPlan
from layerplan.train import metrics
from layerplan.train.frozen_check import FrozenTensors
from layerplan.train.place import Mark
from layerplan.train.prefix_cache import PrefixCache
from layerplan.train.sharding import PlacedModel
from layerplan.train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopHooks:
    """What surrounds the loop: where rows come from, where numbers and checkpoints go, when to stop."""

    iter_steps: Callable[[int, int], Iterator[PackedRows]]
    """(start, stop) in the data order to this rank's rows of each step."""
    save: Callable[[TrainState], None]
    """Saves and reports a checkpoint; called on every rank."""
    should_stop: Callable[[], bool]
    """Asked on rank 0 every step; True ends the run after a checkpoint."""
    sink: metrics.MetricSink | None
    """Metrics of rank 0; None elsewhere."""
    validation: PackedRows | None
    """Held-out rows, the same on every rank."""
    restore: Callable[[], TrainState | None] = lambda: None
    """Loads the newest complete checkpoint of this run into the model; None when there is none yet."""
    say: Callable[[str], None] = logger.info
    """Takes the console lines of rank 0."""
    write_ledger: Callable[[int, PackedRows], None] | None = None
    """Takes (1-based step, rows) when a ledger is wanted."""
    mark: Mark = lambda part, step: None
    """Takes (part, step) as each part begins, so that a stall can be told and named."""
    measure: Callable[[TrainState], float | None] | None = None
    """Takes the place of the validation, and returns its loss; called on every rank."""


@dataclass(frozen=True)
class LoopSetup:
    """The objects the loop works on."""

    placed: PlacedModel
    optimizer: torch.optim.Optimizer
    applied: AppliedPlan
    config: TrainConfig
    device: torch.device
    rank: int
    world_size: int
    seed: int = 0
    """Of the run, on which a model's own noise depends, such as dropout."""
    flops_per_token: float = 0.0
    """Of this plan, forward and backward."""
    peak_flops: float = 1.0
    """Of one worker, FLOP/s."""
    predicted_memory_gib: float = 0.0
    """Per worker."""
    memory_advice: str = ""
    """What to say when memory runs out."""
    profile_dir: Path | None = None
    """Where a trace goes."""
    rewarm: tuple[int, int] = (0, 0)
    """(first step, number of steps) over which the learning rate rises again after a change of plan."""
    frozen: FrozenTensors | None = None
    """Checked before every checkpoint; None leaves it out."""
    prefix: PrefixCache | None = None
    """What is kept of the frozen prefix's output; None for nothing."""
    host_group: dist.ProcessGroup | None = None
    """A gloo group of all ranks for what hosts tell each other; None where the default group is one."""
    node: int = 0
    """Index of the node this rank is on."""
    read_load: Callable[[], tuple[float, float, float]] = lambda: (0.0, 0.0, 0.0)
    """Percent of its CPUs since the last time, megabytes in use, percent of its memory."""
