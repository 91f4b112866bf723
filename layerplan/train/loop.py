"""The training loop, visible in one place: read rows, accumulate, judge, update, log, validate, save.

It runs on every rank, under Ray Train or in a single process; what differs is handed in through `LoopHooks`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.errors import TrainingError
from layerplan.models.freezing import AppliedPlan, check_gradient_coverage
from layerplan.train import metrics
from layerplan.train.frozen_check import FrozenTensors
from layerplan.train.optim import compute_clip_scale, compute_grad_norm
from layerplan.train.place import IN_STEP, LOGGING, Mark
from layerplan.train.profiling import profiled
from layerplan.train.schedule import compute_lr_scale, compute_rewarm_scale
from layerplan.train.sharding import PlacedModel
from layerplan.train.stability import StabilityMonitor, StepDecision
from layerplan.train.state import PROOF_FIELDS, TrainState
from layerplan.train.step import TensorBatch, accumulate_gradients, equalise
from layerplan.train.throughput import Window, compute_mfu, peak_memory_gib, render_progress
from layerplan.train.validation import compute_validation_loss

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


@dataclass(frozen=True)
class StepOutcome:
    """Global numbers of one step before its update is decided."""

    loss: float
    grad_norm: Tensor
    tokens: int
    wants_stop: bool


def run_loop(setup: LoopSetup, state: TrainState, hooks: LoopHooks, *, stop_step: int | None = None) -> TrainState:
    """Trains from `state.step` to `stop_step`, or to `config.max_steps`, and returns the final state.

    Raises:
        TrainingError: When gradients do not match the plan, memory runs out, or a stability policy says stop.
    """
    config = setup.config
    end = config.max_steps if stop_step is None else min(stop_step, config.max_steps)
    monitor = StabilityMonitor(config.stability)
    monitor.recent.extend(state.recent_losses)
    rows_of_steps = hooks.iter_steps(state.step + state.data_offset, end + state.data_offset)
    window = Window()
    checked: tuple[int, ...] | None = None
    state = _validate_base(setup, state, hooks)
    while state.step < end:
        started = time.perf_counter()
        hooks.mark(IN_STEP[0], state.step + 1)
        with window.phase("data"):
            rows = next(rows_of_steps)
        with profiled(setup.profile_dir if state.step + 1 == config.profile_step else None, state.step + 1):
            hooks.mark(IN_STEP[1], state.step + 1)
            outcome = _forward_backward(setup, state, rows, hooks, window)
            if checked != (starts := setup.placed.model.list_starts(rows)):
                state, checked = _check_coverage(setup, state, starts), starts
            verdict = monitor.judge(
                state.step + 1,
                outcome.loss,
                float(outcome.grad_norm),
                skipped=state.skipped_steps,
                rollbacks=state.rollbacks,
            )
            _report_event(verdict, state.step + 1, setup.rank, hooks)
            if verdict.action == "rollback" and (restored := _roll_back(state, hooks)) is not None:
                state = restored
                setup.optimizer.zero_grad(set_to_none=True)
                monitor.forget()
                rows_of_steps = hooks.iter_steps(state.step + state.data_offset, end + state.data_offset)
                continue
            hooks.mark(IN_STEP[2], state.step + 1)
            with window.phase("optimizer"):
                _update(setup, state.step, outcome, apply=verdict.action == "apply")
        if hooks.write_ledger is not None:
            hooks.write_ledger(state.step + 1, rows)
        seconds = time.perf_counter() - started
        hooks.mark(LOGGING, state.step + 1)
        state = _advance(
            state, outcome, seconds, skipped=verdict.action != "apply", monitor=monitor, peak_flops=setup.peak_flops
        )
        window.steps, window.tokens, window.seconds = (
            window.steps + 1,
            window.tokens + outcome.tokens,
            window.seconds + seconds,
        )
        is_last = state.step == end or outcome.wants_stop
        if state.step == 1 or state.step % config.log_every_steps == 0 or is_last:
            state = _log(setup, state, outcome, window, hooks)
            window = Window()
        if state.step % config.validate_every_steps == 0 or is_last:
            state = _validate(setup, state, hooks)
        if state.step % config.checkpoint_every_steps == 0 or is_last:
            state = _save(setup, state, hooks)
        if outcome.wants_stop:
            break
    return state


def _forward_backward(
    setup: LoopSetup, state: TrainState, rows: PackedRows, hooks: LoopHooks, window: Window
) -> StepOutcome:
    # dropout, where a model has any, is a function of the step, so that a resume repeats it
    torch.manual_seed(state.step * setup.world_size + setup.rank)
    placed = setup.placed
    batches = placed.model.make_batches(rows, setup.config.micro_batch_size, setup.device)
    batches = equalise(batches, placed.model.recipe, setup.device, setup.world_size)
    labels, tokens, wants_stop = _agree(setup, batches, rows, hooks)
    try:
        with window.phase("forward_backward"):
            loss_sum = accumulate_gradients(placed.model, batches, setup.world_size / labels, placed.set_sync)
            if placed.finish_sync is not None:
                placed.finish_sync()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(f"step {state.step + 1}: out of memory. {setup.memory_advice}") from error
    parameters = [parameter for parameter in placed.model.parameters() if parameter.requires_grad]
    loss = float(_reduce_sum(loss_sum, setup)) / labels
    norm = compute_grad_norm(parameters, placed.reduce_square, compiled=setup.config.compile)
    return StepOutcome(loss, norm, tokens, wants_stop)


def _agree(setup: LoopSetup, batches: list[TensorBatch], rows: PackedRows, hooks: LoopHooks) -> tuple[float, int, bool]:
    """One small all-reduce a step: global labels and tokens, and whether rank 0 was asked to stop."""
    wants_stop = setup.rank == 0 and hooks.should_stop()
    mine = [sum(batch.num_labels for batch in batches), int(np.sum(rows.document_ids >= 0)), int(wants_stop)]
    counts = _reduce_sum(torch.tensor(mine, dtype=torch.float64, device=setup.device), setup).tolist()
    return max(counts[0], 1.0), int(counts[1]), counts[2] > 0


def _check_coverage(setup: LoopSetup, state: TrainState, starts: tuple[int, ...]) -> TrainState:
    model = setup.placed.model
    check_gradient_coverage(model, model.expect_gradients(setup.applied, starts))
    coverage = {"trainable_with_gradient": len(setup.applied.trainable), "frozen_without": len(setup.applied.frozen)}
    return state.model_copy(update={"gradient_coverage": coverage, "coverage_checks": state.coverage_checks + 1})


def _update(setup: LoopSetup, step: int, outcome: StepOutcome, *, apply: bool) -> None:
    config = setup.config
    if apply:
        rate = config.optimizer.learning_rate * compute_lr_scale(step, config.max_steps, config.schedule)
        rate *= compute_rewarm_scale(step, *setup.rewarm)
        for group in setup.optimizer.param_groups:
            group["lr"] = rate
        scale = compute_clip_scale(outcome.grad_norm, config.optimizer.max_grad_norm)
        setup.optimizer.step(grad_scale=scale)
    setup.optimizer.zero_grad(set_to_none=True)


def _report_event(verdict: StepDecision, step: int, rank: int, hooks: LoopHooks) -> None:
    if verdict.event and hooks.sink is not None:
        hooks.sink.log_event(verdict.event, step, verdict.message)
    if verdict.event and rank == 0:
        hooks.say(verdict.message)
    if verdict.action == "stop":
        raise TrainingError(verdict.message)


def _roll_back(state: TrainState, hooks: LoopHooks) -> TrainState | None:
    """The state of the newest checkpoint, moved past the rows that led here; None when nothing was saved yet."""
    hooks.mark("rolling back", state.step)
    restored = hooks.restore()
    if restored is None:
        return None
    offset = state.step + state.data_offset + 1 - restored.step
    # the checkpoint may be the last of the phase before, and what was proved since then belongs to this one
    kept = {name: getattr(state, name) for name in PROOF_FIELDS}
    update = {"rollbacks": state.rollbacks + 1, "data_offset": offset, "recent_losses": ()}
    return restored.model_copy(update=kept | update)


def _advance(
    state: TrainState,
    outcome: StepOutcome,
    seconds: float,
    *,
    skipped: bool,
    monitor: StabilityMonitor,
    peak_flops: float,
) -> TrainState:
    update = {
        "step": state.step + 1,
        "tokens_seen": state.tokens_seen + outcome.tokens,
        "train_s": state.train_s + seconds,
        "skipped_steps": state.skipped_steps + int(skipped),
        "recent_losses": tuple(monitor.recent),
        "window_losses": (*state.window_losses, outcome.loss),
        "peak_flops": peak_flops,
    }
    return state.model_copy(update=update)


def _log(setup: LoopSetup, state: TrainState, outcome: StepOutcome, window: Window, hooks: LoopHooks) -> TrainState:
    """Logs the mean loss since the last line: the loss of one small batch says little."""
    loss = state.mean_window_loss()
    first = loss if state.first_loss is None else state.first_loss
    state = state.model_copy(update={"window_losses": (), "last_loss": loss, "first_loss": first})
    if setup.rank != 0:
        return state
    rate = setup.optimizer.param_groups[0]["lr"]
    mfu = compute_mfu(
        window.tokens_per_s, setup.flops_per_token, peak_flops=setup.peak_flops, num_workers=setup.world_size
    )
    values = {
        metrics.LOSS: loss,
        metrics.GRAD_NORM: float(outcome.grad_norm),
        metrics.LEARNING_RATE: rate,
        metrics.TOKENS_SEEN: float(state.tokens_seen),
        metrics.SKIPPED_STEPS: float(state.skipped_steps),
        metrics.ROLLBACKS: float(state.rollbacks),
        metrics.TOKENS_PER_S: window.tokens_per_s,
        metrics.STEP_S: window.step_s,
        metrics.MFU: mfu,
        metrics.DATA_WAIT_SHARE: window.phases_s.get("data", 0.0) / max(window.seconds, 1e-9),
        metrics.PEAK_MEMORY_GIB: peak_memory_gib(setup.device),
        metrics.PREDICTED_MEMORY_GIB: setup.predicted_memory_gib,
    }
    for phase in ("forward_backward", "optimizer"):
        values[metrics.PHASE_SHARE.format(phase=phase)] = window.phases_s.get(phase, 0.0) / max(window.seconds, 1e-9)
    if hooks.sink is not None:
        hooks.sink.log_metrics(values, step=state.step)
    hooks.say(render_progress(state.step, setup.config, loss=loss, rate=rate, window=window, mfu=mfu))
    return state


def _validate_base(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> TrainState:
    """What the base makes of the held-out rows, measured once; a step seeds its own noise, so none is changed by it."""
    if state.step > 0 or state.base_validation_loss is not None:
        return state
    return state.model_copy(update={"base_validation_loss": _measure_validation(setup, state, hooks)})


def _validate(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> TrainState:
    return state.model_copy(update={"validation_loss": _measure_validation(setup, state, hooks)})


def _measure_validation(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> float | None:
    if hooks.validation is None:
        return None
    hooks.mark("validating", state.step)
    loss = compute_validation_loss(
        setup.placed.model,
        hooks.validation,
        micro_batch_size=setup.config.micro_batch_size,
        device=setup.device,
        rank=setup.rank,
        world_size=setup.world_size,
    )
    if hooks.sink is not None:
        hooks.sink.log_metrics({metrics.VALIDATION_LOSS: loss}, step=state.step)
    if setup.rank == 0:
        hooks.say(f"step {state.step}/{setup.config.max_steps}  validation loss {loss:.4f}")
    return loss


def _save(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> TrainState:
    hooks.mark("saving", state.step)
    values = {}
    if setup.frozen is not None:
        started = time.perf_counter()
        setup.frozen.check()
        values[metrics.FROZEN_CHECK_S] = time.perf_counter() - started
        state = state.count_frozen_check(values[metrics.FROZEN_CHECK_S])
        values[metrics.FROZEN_CHECKS] = float(state.frozen_checks)
    started = time.perf_counter()
    hooks.save(state)
    values[metrics.CHECKPOINT_STALL_S] = time.perf_counter() - started
    if hooks.sink is not None:
        hooks.sink.log_metrics(values, step=state.step)
    return state


def _reduce_sum(value: Tensor, setup: LoopSetup) -> Tensor:
    if setup.world_size > 1:
        dist.all_reduce(value)
    return value
