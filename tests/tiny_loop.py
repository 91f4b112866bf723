"""The real training loop in one process over a model that trains in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.models.freezing import apply_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.placement import Placement
from layerplan.train.frozen_check import FrozenTensors
from layerplan.train.loop_setup import LoopHooks, LoopSetup
from layerplan.train.optim import build_optimizer
from layerplan.train.sharding import place_model
from layerplan.train.state import TrainState
from layerplan.train.step import LossModel

SEQ_LEN = 12


@dataclass
class Sink:
    """Keeps what the loop reports."""

    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    events: list[tuple[str, int]] = field(default_factory=list)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.setdefault(step, {}).update(metrics)

    def log_event(self, name: str, step: int, message: str) -> None:
        self.events.append((name, step))

    def close(self) -> None: ...


def make_rows(
    step: int, *, batch: int, vocab_size: int, token: int | None = None, start: int | None = None
) -> PackedRows:
    """The rows of one step, drawn by its number; `token` is put at the start of the first.

    Each row is one document, or two where `start` says where the second begins.
    """
    ids = np.random.default_rng(step).integers(0, vocab_size, (batch, SEQ_LEN), dtype=np.int32)
    if token is not None:
        ids[0, 0] = token
    columns = np.tile(np.arange(SEQ_LEN, dtype=np.int32), (batch, 1))
    is_second = columns >= (SEQ_LEN if start is None else start)
    positions = np.where(is_second, columns - (start or 0), columns)
    return PackedRows(np.arange(batch) + step * batch, ids, is_second.astype(np.int32), positions)


def make_loop(
    model: nn.Module,
    plan: FreezePlan,
    config: TrainConfig,
    *,
    rows_of_step: Callable[[int], PackedRows],
    save: Callable[[TrainState], None] = lambda state: None,
    sink: Sink | None = None,
    placement: Placement | None = None,
    device: torch.device | None = None,
    loss_model: Callable[..., LossModel] = LossModel,
    **setup: Any,
) -> tuple[LoopSetup, LoopHooks]:
    """Applies the plan, places the model (on the CPU, unless told otherwise) and builds its optimizer, as a worker does."""

    def iter_steps(start: int, stop: int) -> Iterator[PackedRows]:
        return (rows_of_step(step) for step in range(start, stop))

    device = device or torch.device("cpu")
    applied = apply_plan(model, plan)
    placement = placement or Placement("replicate", "replicate")
    placed = place_model(model, plan, config, placement, world_size=1, device=device, loss_model=loss_model)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters, compiled=config.compiles)
    hooks = LoopHooks(iter_steps, save, lambda: False, sink, None, say=lambda line: None)
    frozen = FrozenTensors(placed.model, config.compute_dtype)
    return LoopSetup(placed, optimizer, applied, config, device, 0, 1, frozen=frozen, **setup), hooks
