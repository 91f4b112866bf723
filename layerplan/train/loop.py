"""The training loop, visible in one place: read rows, accumulate, clip, update, log, validate, save.

It runs on every rank, under Ray Train or in a single process; what differs is handed in through `LoopHooks`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PADDING, PackedRows
from layerplan.errors import TrainingError
from layerplan.models.freezing import AppliedPlan, check_gradient_coverage
from layerplan.train import metrics
from layerplan.train.optim import clip_gradients
from layerplan.train.schedule import compute_lr_scale
from layerplan.train.state import TrainState
from layerplan.train.step import TensorBatch, accumulate_gradients, make_batch


@dataclass(frozen=True)
class LoopHooks:
    """What surrounds the loop: where rows come from, where numbers and checkpoints go, when to stop."""

    iter_steps: Callable[[int, int], Iterator[PackedRows]]
    """(start_step, stop_step) to this rank's rows of each step."""
    save: Callable[[TrainState], None]
    """Saves and reports a checkpoint; called on every rank."""
    should_stop: Callable[[], bool]
    """Asked on rank 0 every step; True ends the run after a checkpoint."""
    sink: metrics.MetricSink | None
    """Metrics of rank 0; None elsewhere."""
    validation: PackedRows | None
    """Held-out rows, the same on every rank."""
    write_ledger: Callable[[int, PackedRows], None] | None = None
    """Takes (step, rows) when a ledger is wanted."""


@dataclass(frozen=True)
class LoopSetup:
    """The objects the loop works on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    applied: AppliedPlan
    config: TrainConfig
    device: torch.device
    rank: int
    world_size: int
    seq_len: int


def run_loop(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> TrainState:
    """Trains from `state.step` to `config.max_steps` and returns the final state.

    Raises:
        TrainingError: When gradients do not match the plan, or too many steps are not finite.
    """
    config = setup.config
    rows_of_steps = hooks.iter_steps(state.step, config.max_steps)
    window = _Window()
    covered = False
    while state.step < config.max_steps:
        started = time.perf_counter()
        rows = next(rows_of_steps)
        window.data_s += time.perf_counter() - started
        batches = [make_batch(piece, setup.device) for piece in rows.split(config.micro_batch_size)]
        labels, stop = _agree(setup, batches, hooks)
        loss_sum = accumulate_gradients(setup.model, batches, scale=setup.world_size / labels)
        if not covered:
            check_gradient_coverage(setup.model, setup.applied)
            covered = True
        loss = _reduce_sum(loss_sum, setup) / labels
        norm = clip_gradients(setup.model, config.optimizer.max_grad_norm)
        state = _update(setup, state, loss, norm, hooks)
        if hooks.write_ledger is not None:
            hooks.write_ledger(state.step - 1, rows)
        seconds = time.perf_counter() - started
        tokens = config.global_batch_size * setup.seq_len
        state = state.model_copy(update={"tokens_seen": state.tokens_seen + tokens, "train_s": state.train_s + seconds})
        window.add(seconds, tokens)
        is_last = state.step == config.max_steps or stop
        if state.step == 1 or state.step % config.log_every_steps == 0 or is_last:
            state = _log(setup, state, float(loss), float(norm), window, hooks)
            window = _Window()
        if state.step % config.validate_every_steps == 0 or is_last:
            state = _validate(setup, state, hooks)
        if state.step % config.checkpoint_every_steps == 0 or is_last:
            hooks.save(state)
        if stop:
            break
    return state


def compute_validation_loss(setup: LoopSetup, rows: PackedRows) -> float:
    """Mean next-token loss over the held-out rows, each rank taking every world_size-th row.

    Every rank runs the same number of forward passes, as sharded layers are gathered together; a rank without a row
    of its own runs one whose positions are all padding.
    """
    size = setup.config.micro_batch_size * setup.world_size
    total = torch.zeros(2, dtype=torch.float64, device=setup.device)
    setup.model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), size):
            mine = rows.take(start + setup.rank, min(start + size, len(rows)))
            picked = _every(mine, setup.world_size) if len(mine) else _blank(rows)
            batch = make_batch(picked, setup.device)
            loss = setup.model(batch.input_ids_BT, batch.position_ids_BT, batch.document_ids_BT, batch.labels_BT)
            total += torch.stack([loss.double(), torch.tensor(float(batch.num_labels), device=setup.device).double()])
    setup.model.train()
    total = _reduce_sum(total, setup)
    return float(total[0] / total[1])


def _agree(setup: LoopSetup, batches: list[TensorBatch], hooks: LoopHooks) -> tuple[float, bool]:
    """One small all-reduce a step: the global number of labels, and whether rank 0 was asked to stop."""
    wants_stop = setup.rank == 0 and hooks.should_stop()
    counts = torch.tensor(
        [float(sum(batch.num_labels for batch in batches)), float(wants_stop)], dtype=torch.float64, device=setup.device
    )
    counts = _reduce_sum(counts, setup)
    return max(float(counts[0]), 1.0), bool(counts[1] > 0)


def _update(setup: LoopSetup, state: TrainState, loss: Tensor, norm: Tensor, hooks: LoopHooks) -> TrainState:
    config = setup.config
    scale = compute_lr_scale(state.step, config.max_steps, config.schedule)
    skipped = state.skipped_steps
    if bool(torch.isfinite(loss)) and bool(torch.isfinite(norm)):
        for group in setup.optimizer.param_groups:
            group["lr"] = config.optimizer.learning_rate * scale
        setup.optimizer.step()
    else:
        skipped += 1
        _note_nonfinite(config, state.step, skipped, hooks)
    setup.optimizer.zero_grad(set_to_none=True)
    return state.model_copy(update={"step": state.step + 1, "skipped_steps": skipped})


def _note_nonfinite(config: TrainConfig, step: int, skipped: int, hooks: LoopHooks) -> None:
    message = f"step {step + 1}: loss or gradient is not finite; its update is left out ({skipped} so far)"
    if hooks.sink is not None:
        hooks.sink.log_event("nonfinite", step + 1, message)
    if config.stability.on_nonfinite == "stop" or skipped > config.stability.max_nonfinite:
        raise TrainingError(
            f"{message}; train.stability allows max_nonfinite={config.stability.max_nonfinite}"
            f" with on_nonfinite={config.stability.on_nonfinite}"
        )


def _log(
    setup: LoopSetup, state: TrainState, loss: float, norm: float, window: _Window, hooks: LoopHooks
) -> TrainState:
    update: dict[str, Any] = {"last_loss": loss}
    if state.first_loss is None:
        update["first_loss"] = loss
    if hooks.sink is None:
        return state.model_copy(update=update)
    rate = setup.optimizer.param_groups[0]["lr"]
    tokens_per_s = window.tokens / max(window.seconds, 1e-9)
    hooks.sink.log_metrics(
        {
            metrics.LOSS: loss,
            metrics.GRAD_NORM: norm,
            metrics.LEARNING_RATE: rate,
            metrics.TOKENS_SEEN: float(state.tokens_seen),
            metrics.SKIPPED_STEPS: float(state.skipped_steps),
            metrics.TOKENS_PER_S: tokens_per_s,
            metrics.STEP_S: window.seconds / window.steps,
            metrics.DATA_WAIT_SHARE: window.data_s / max(window.seconds, 1e-9),
        },
        step=state.step,
    )
    left_s = (setup.config.max_steps - state.step) * window.seconds / window.steps
    print(
        f"[train] step {state.step}/{setup.config.max_steps}  loss {loss:.4f}  lr {rate:.2e}"
        f"  {tokens_per_s:,.0f} tokens/s  {left_s:.0f} s left",
        flush=True,
    )
    return state.model_copy(update=update)


def _validate(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> TrainState:
    if hooks.validation is None:
        return state
    loss = compute_validation_loss(setup, hooks.validation)
    if hooks.sink is not None:
        hooks.sink.log_metrics({metrics.VALIDATION_LOSS: loss}, step=state.step)
        print(f"[train] step {state.step}/{setup.config.max_steps}  validation loss {loss:.4f}", flush=True)
    return state.model_copy(update={"validation_loss": loss})


@dataclass
class _Window:
    """Sums since the last log line."""

    steps: int = 0
    seconds: float = 0.0
    data_s: float = 0.0
    tokens: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        self.steps += 1
        self.seconds += seconds
        self.tokens += tokens


def _reduce_sum(value: Tensor, setup: LoopSetup) -> Tensor:
    if setup.world_size > 1:
        dist.all_reduce(value)
    return value


def _every(rows: PackedRows, step: int) -> PackedRows:
    return PackedRows(rows.row_ids[::step], rows.input_ids[::step], rows.document_ids[::step], rows.position_ids[::step])


def _blank(rows: PackedRows) -> PackedRows:
    one = rows.take(0, 1)
    return PackedRows(one.row_ids, one.input_ids, np.full_like(one.document_ids, PADDING), one.position_ids)


