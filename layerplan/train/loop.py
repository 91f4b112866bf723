"""The training loop, visible in one place: take rows, accumulate, update, judge, log, validate, save.

It runs on every rank, under Ray Train or in a single process; what differs is handed in through `LoopHooks`.

Between two log lines the host never waits for the device. What it has to know before a step, it knows from the rows; a step
that is not finite is left out by the device itself. What became of a step is read when the next one has been launched, or
at once where something depends on it: a log line, a validation, a checkpoint, the last step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from layerplan.corpus.rows import PackedRows
from layerplan.errors import TrainingError
from layerplan.models.freezing import check_gradient_coverage
from layerplan.train import metrics
from layerplan.train.agreement import Agreement, StepCounts
from layerplan.train.ahead import PreparedStep, StepsAhead
from layerplan.train.loop_setup import LoopHooks, LoopSetup
from layerplan.train.optim import compute_clip_scale, compute_grad_norm
from layerplan.train.out_of_memory import OutOfMemoryError, is_out_of_memory
from layerplan.train.peers import PeerFacts, gather_facts, summarise_peers
from layerplan.train.place import IN_STEP, LOGGING
from layerplan.train.profiling import profiled
from layerplan.train.readback import Readback
from layerplan.train.schedule import compute_lr_scale, compute_rewarm_scale
from layerplan.train.stability import StabilityMonitor, StepDecision
from layerplan.train.state import PROOF_FIELDS, TrainState
from layerplan.train.step import TensorBatch, accumulate_gradients, fill_up, seed_device
from layerplan.train.throughput import Window, compute_mfu, peak_memory_gib, render_progress
from layerplan.train.validation import compute_validation_loss

SEED_STRIDE = 0x9E3779B1
"""Keeps the steps of one run's seed apart from those of the next; a CPU's generator takes 32 bits of a seed."""


@dataclass(frozen=True)
class TakenStep:
    """The rows of the step to be launched next, and what all ranks agree on about it."""

    step: int
    """1-based."""
    prepared: PreparedStep
    agreement: Agreement


@dataclass(frozen=True)
class LaunchedStep:
    """A step the device was told to compute; its global loss and gradient norm arrive by themselves."""

    step: int
    prepared: PreparedStep
    counts: StepCounts
    loss_sum: Tensor
    grad_norm: Tensor
    """Before clipping."""
    numbers: Readback
    """Both, on their way to the host."""
    is_last: bool
    is_due: bool
    """Whether something depends on the numbers at once."""

    def read(self) -> tuple[float, float]:
        """Mean loss and gradient norm; waits for the device."""
        loss_sum, norm = self.numbers.read()
        return loss_sum / max(self.counts.labels, 1), norm


def run_loop(setup: LoopSetup, state: TrainState, hooks: LoopHooks, *, stop_step: int | None = None) -> TrainState:
    """Trains from `state.step` to `stop_step`, or to `config.max_steps`, and returns the final state.

    Raises:
        TrainingError: When gradients do not match the plan, memory runs out, or a stability policy says stop.
    """
    config = setup.config
    end = config.max_steps if stop_step is None else min(stop_step, config.max_steps)
    with _open_steps(setup, state, hooks, end) as ahead:
        books = Books(setup, hooks, _validate_base(setup, state, hooks))
        unread: LaunchedStep | None = None
        taken = _take(books, ahead, state.step + 1) if state.step < end else None
        while taken is not None:
            with profiled(setup.profile_dir if taken.step == config.profile_step else None, taken.step):
                launched = _forward_backward(books, taken, end)
                books.check_coverage(launched)
                hooks.mark(IN_STEP[2], launched.step)
                with books.window.phase("optimizer"):
                    _update(setup, launched, apply=books.applies(launched))
            settling = [unread, launched] if launched.is_due else [unread]
            bad = next((each for each in settling if each is not None and not books.settle(each)), None)
            unread = None if launched.is_due or bad is not None else launched
            hooks.mark(LOGGING, launched.step)
            if bad is not None:
                ahead.put_back([launched.prepared] if bad is not launched else [])
                ahead.extend(end + books.state.data_offset)
            elif launched.is_due:
                books.report(launched)
                if launched.is_last:
                    break
            taken = _take(books, ahead, books.state.step + (1 if unread is None else 2))
    return books.state


class Books:
    """What is known of the steps whose numbers were read: the state, the sums of the next log line, the recent losses."""

    def __init__(self, setup: LoopSetup, hooks: LoopHooks, state: TrainState) -> None:
        self.setup = setup
        self.hooks = hooks
        self.state = state
        self.window = Window()
        self._monitor = StabilityMonitor(setup.config.stability)
        self._monitor.recent.extend(state.recent_losses)
        self._verdict: tuple[int, StepDecision] | None = None
        self._checked: tuple[int, ...] | None = None
        self._since = time.perf_counter()

    @property
    def looks_first(self) -> bool:
        """Whether the host looks at the loss of a step before it is applied, and so waits for the device."""
        return self._monitor.looks_first

    def check_coverage(self, launched: LaunchedStep) -> None:
        """Compares the gradients with the plan, at the first step and whenever rows start at other layers.

        Raises:
            TrainingError: When they do not match.
        """
        starts = self.setup.placed.model.list_starts(launched.prepared.rows)
        if self._checked != starts:
            self.state, self._checked = _check_coverage(self.setup, self.state, starts), starts

    def applies(self, launched: LaunchedStep) -> bool:
        """Whether the host lets the update be; it looks at the loss for that only where the policy asks it to."""
        return not self.looks_first or self._judge(launched).action == "apply"

    def settle(self, launched: LaunchedStep) -> bool:
        """Takes in what became of a step; False when training went back to a checkpoint because of it.

        Raises:
            TrainingError: When a stability policy says stop.
        """
        verdict = self._judge(launched)
        _report_event(verdict, launched.step, self.setup.rank, self.hooks)
        if verdict.action == "rollback" and (restored := _roll_back(self.state, self.hooks)) is not None:
            self.state, self._verdict = restored, None
            self.setup.optimizer.zero_grad(set_to_none=True)
            self._monitor.forget()
            return False
        if self.hooks.write_ledger is not None:
            self.hooks.write_ledger(launched.step, launched.prepared.rows)
        self._advance(launched, verdict)
        return True

    def report(self, launched: LaunchedStep) -> None:
        """Logs, validates and saves what is due after a step that was settled."""
        setup, config, step = self.setup, self.setup.config, launched.step
        if _is_due(step, config.log_every_steps, launched.is_last) or step == 1:
            self.state = self._log(launched)
            self.window = Window()
        if _is_due(step, config.validate_every_steps, launched.is_last):
            self.state = _validate(setup, self.state, self.hooks)
        if _is_due(step, config.checkpoint_every_steps, launched.is_last):
            self.state = _save(setup, self.state, self.hooks)
        self._since = time.perf_counter()

    def _log(self, launched: LaunchedStep) -> TrainState:
        """Logs the mean loss since the last line: the loss of one small batch says little."""
        setup, window, state, hooks = self.setup, self.window, self.state, self.hooks
        loss = state.mean_window_loss()
        first = loss if state.first_loss is None else state.first_loss
        state = state.model_copy(update={"window_losses": (), "last_loss": loss, "first_loss": first})
        waits = window.phases_s.get("peers", 0.0), window.phases_s.get("data", 0.0)
        mine = PeerFacts(setup.node, *waits, peak_memory_gib(setup.device), *setup.read_load())
        peers = gather_facts(mine, setup.world_size, setup.host_group)
        if setup.rank != 0:
            return state
        mfu = compute_mfu(
            window.tokens_per_s, setup.flops_per_token, peak_flops=setup.peak_flops, num_workers=setup.world_size
        )
        rate = setup.optimizer.param_groups[0]["lr"]
        if hooks.sink is not None:
            values = _collect_values(setup, state, launched, window) | {metrics.LOSS: loss, metrics.MFU: mfu}
            values |= summarise_peers(peers, steps=window.steps, seconds=window.seconds)
            hooks.sink.log_metrics(values, step=state.step)
        numbers = {"loss": loss, "rate": rate, "mfu": mfu, "num_workers": setup.world_size}
        hooks.say(render_progress(state.step, setup.config, window=window, **numbers))
        return state

    def _judge(self, launched: LaunchedStep) -> StepDecision:
        if self._verdict is None or self._verdict[0] != launched.step:
            counts = {"skipped": self.state.skipped_steps, "rollbacks": self.state.rollbacks}
            self._verdict = launched.step, self._monitor.judge(launched.step, *launched.read(), **counts)
        return self._verdict[1]

    def _advance(self, launched: LaunchedStep, verdict: StepDecision) -> None:
        now = time.perf_counter()
        seconds, self._since, self._verdict = now - self._since, now, None
        is_left_out, is_spike = verdict.action != "apply", verdict.event == "loss_spike"
        update = {
            "step": launched.step,
            "tokens_seen": self.state.tokens_seen + launched.counts.tokens,
            "train_s": self.state.train_s + seconds,
            "skipped_steps": self.state.skipped_steps + int(is_left_out and not is_spike),
            "skipped_spikes": self.state.skipped_spikes + int(is_left_out and is_spike),
            "recent_losses": tuple(self._monitor.recent),
            "window_losses": (*self.state.window_losses, launched.read()[0]),
            "peak_flops": self.setup.peak_flops,
        }
        self.state = self.state.model_copy(update=update)
        self.window.steps += 1
        self.window.tokens += launched.counts.tokens
        self.window.seconds += seconds


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return is_last or step % every == 0


def _open_steps(setup: LoopSetup, state: TrainState, hooks: LoopHooks, end: int) -> StepsAhead:
    def make(rows: PackedRows) -> list[TensorBatch]:
        batches = setup.placed.model.make_batches(rows, setup.config.micro_rows, setup.device)
        return batches if setup.prefix is None else setup.prefix.attach(rows, batches)

    start = state.step + state.data_offset
    return StepsAhead(hooks.iter_steps, make, setup.device, start=start, stop=end + state.data_offset)


def _take(books: Books, ahead: StepsAhead, step: int) -> TakenStep:
    """The next step's rows, and the question to all ranks about it."""
    setup, hooks = books.setup, books.hooks
    hooks.mark(IN_STEP[0], step)
    with books.window.phase("data"):
        prepared = ahead.take()
    mine = StepCounts(
        labels=sum(batch.num_labels for batch in prepared.batches),
        tokens=int(np.sum(prepared.rows.document_ids >= 0)),
        num_batches=len(prepared.batches),
        wants_stop=setup.rank == 0 and hooks.should_stop(),
    )
    return TakenStep(step, prepared, Agreement(mine, setup.world_size, setup.host_group))


def _forward_backward(books: Books, taken: TakenStep, end: int) -> LaunchedStep:
    setup, config, step = books.setup, books.setup.config, taken.step
    books.hooks.mark(IN_STEP[1], step)
    # dropout, where a model has any, is a function of the run's seed and the step, so that a resume repeats it
    place = (step - 1) * setup.world_size + setup.rank
    seed_device((setup.seed * SEED_STRIDE + place) % 2**32, setup.device)
    placed = setup.placed
    with books.window.phase("peers"):
        counts = taken.agreement.wait()
    taken.prepared.wait()
    batches = fill_up(taken.prepared.batches, counts.num_batches, setup.device)
    try:
        with books.window.phase("forward_backward"):
            scale = setup.world_size / max(counts.labels, 1)
            loss_sum = accumulate_gradients(placed.model, batches, scale, placed.set_sync)
            if placed.finish_sync is not None:
                with books.window.phase("peers"):
                    placed.finish_sync()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"step {step}: out of memory. {setup.memory_advice}") from error
    loss_sum = _reduce_sum(loss_sum, setup)
    parameters = [parameter for parameter in placed.model.parameters() if parameter.requires_grad]
    norm = compute_grad_norm(parameters, placed.reduce_square, compiled=config.compiles)
    is_last = step == end or counts.wants_stop
    spacings = (config.log_every_steps, config.validate_every_steps, config.checkpoint_every_steps)
    is_due = step == 1 or any(_is_due(step, every, is_last) for every in spacings) or books.looks_first
    return LaunchedStep(
        step, taken.prepared, counts, loss_sum, norm, Readback(loss_sum, norm), is_last=is_last, is_due=is_due
    )


def _check_coverage(setup: LoopSetup, state: TrainState, starts: tuple[int, ...]) -> TrainState:
    model = setup.placed.model
    check_gradient_coverage(model, model.expect_gradients(setup.applied, starts))
    coverage = {"trainable_with_gradient": len(setup.applied.trainable), "frozen_without": len(setup.applied.frozen)}
    return state.model_copy(update={"gradient_coverage": coverage, "coverage_checks": state.coverage_checks + 1})


def _update(setup: LoopSetup, launched: LaunchedStep, *, apply: bool) -> None:
    config, step = setup.config, launched.step - 1
    if apply:
        rate = config.optimizer.learning_rate * compute_lr_scale(step, config.max_steps, config.schedule)
        rate *= compute_rewarm_scale(step, *setup.rewarm)
        for group in setup.optimizer.param_groups:
            group["lr"] = rate
        scale = compute_clip_scale(launched.grad_norm, config.optimizer.max_grad_norm)
        is_finite = torch.isfinite(launched.loss_sum) & torch.isfinite(launched.grad_norm)
        setup.optimizer.step(grad_scale=scale, found_inf=1 - is_finite.float())
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


def _collect_values(setup: LoopSetup, state: TrainState, launched: LaunchedStep, window: Window) -> dict[str, float]:
    """Metrics that rank 0 knows by itself."""
    values = {
        metrics.GRAD_NORM: launched.read()[1],
        metrics.LEARNING_RATE: setup.optimizer.param_groups[0]["lr"],
        metrics.TOKENS_SEEN: float(state.tokens_seen),
        metrics.SKIPPED_STEPS: float(state.skipped_steps + state.skipped_spikes),
        metrics.ROLLBACKS: float(state.rollbacks),
        metrics.TOKENS_PER_S: window.tokens_per_s,
        metrics.STEP_S: window.step_s,
        metrics.WORKERS: float(setup.world_size),
        metrics.PREDICTED_MEMORY_GIB: setup.predicted_memory_gib,
    }
    for phase in ("forward_backward", "optimizer"):
        values[metrics.PHASE_SHARE.format(phase=phase)] = window.phases_s.get(phase, 0.0) / max(window.seconds, 1e-9)
    return values


def _validate_base(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> TrainState:
    """What the base makes of the held-out rows, measured once; a step seeds its own noise, so none is changed by it."""
    if state.step > 0 or state.base_validation_loss is not None:
        return state
    return state.model_copy(update={"base_validation_loss": _measure_validation(setup, state, hooks)})


def _validate(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> TrainState:
    return state.model_copy(update={"validation_loss": _measure_validation(setup, state, hooks)})


def _measure_validation(setup: LoopSetup, state: TrainState, hooks: LoopHooks) -> float | None:
    if hooks.validation is None and hooks.measure is None:
        return None
    hooks.mark("validating", state.step)
    loss = hooks.measure(state) if hooks.measure is not None else _compute_validation(setup, hooks)
    if loss is None:
        return None
    if hooks.sink is not None:
        hooks.sink.log_metrics({metrics.VALIDATION_LOSS: loss}, step=state.step)
    if setup.rank == 0:
        hooks.say(f"step {state.step}/{setup.config.max_steps}  validation loss {loss:.4f}")
    return loss


def _compute_validation(setup: LoopSetup, hooks: LoopHooks) -> float:
    assert hooks.validation is not None
    return compute_validation_loss(
        setup.placed.model,
        hooks.validation,
        micro_batch_size=setup.config.micro_rows,
        device=setup.device,
        rank=setup.rank,
        world_size=setup.world_size,
    )


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
