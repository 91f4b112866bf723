"""One trial: what it trains, and its course from the first report to the last."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerplan.errors import LayerplanError, first_line
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.run_folder import ROW_LOSSES_NAME, STOP_REQUEST
from layerplan.storage.flag import Flag
from layerplan.sweep.space import Point
from layerplan.train.held_out_rows import load_losses
from layerplan.train.judge import VALIDATION
from layerplan.train.metrics import MetricSink
from layerplan.train.request import TrainRequest, TrainResult
from layerplan.train.trainer import run_training
from layerplan.train.trial_record import add_report, load_record, read_reports

LOSS, PERCENT = "loss", "percent"
"""What Ray Tune compares trials by, and at what: percent of their schedules."""
Train = Callable[[TrainRequest, Callable[[dict[str, Any]], None]], None]


@dataclass(frozen=True)
class Trial:
    """What one trial trains."""

    point: Point
    plan: FreezePlan
    """The plan it trains."""
    steps: int
    """Steps of its schedule."""
    flops: float
    """Predicted FLOPs of all of them."""
    sink_factory: Callable[[int], MetricSink] | None = None
    """Where its metrics go."""
    report_every: int | None = None
    """Steps between its reports; None leaves that to `train.validate_every_steps`."""


def make_request(shared: TrainRequest, trial: Trial) -> TrainRequest:
    """What a trial trains.

    Args:
        shared: What all trials have in common; its `run_dir` is the sweep's folder, its spacings are at most a schedule's.
        trial: The trial.
    """
    config, folder = shared.config, shared.run_dir / trial.point.name
    assert shared.judging is not None, "trials are compared"
    every = {
        "checkpoint_every_steps": min(config.checkpoint_every_steps, trial.steps),
        "validate_every_steps": trial.report_every or min(config.validate_every_steps, trial.steps),
    }
    optimizer = config.optimizer.model_copy(update={"learning_rate": trial.point.learning_rate})
    return replace(
        shared,
        run_dir=folder,
        plan=trial.plan,
        seed=trial.point.seed,
        config=config.model_copy(update={"max_steps": trial.steps, "optimizer": optimizer, **every}),
        sink_factory=trial.sink_factory,
        judging=replace(shared.judging, result=folder / ROW_LOSSES_NAME),
    )


class Course:
    """A trial under way in a thread; what it reported in an earlier job comes first, as it was."""

    def __init__(self, trial: Trial, request: TrainRequest, train: Train) -> None:
        self._request = request
        self._train = train
        self._steps = trial.steps
        self._metric = request.judging.metric if request.judging is not None else VALIDATION
        self._reports: queue.Queue[dict[str, Any]] = queue.Queue()
        self._began = time.perf_counter()
        self._seen = 0
        for report in read_reports(request.run_dir):
            self._pass_on(report)
        self._thread = threading.Thread(target=self._run, name=f"layerplan-{trial.point.name}", daemon=True)
        self._thread.start()

    def next(self) -> dict[str, Any]:
        """The next report; the last one has `done`, with the result's numbers or the error."""
        return self._reports.get()

    def stop(self) -> None:
        """Ends a training that goes on, with a checkpoint, and returns when it has ended."""
        while self._thread.is_alive():
            Flag(self._request.run_dir / STOP_REQUEST).touch()
            self._thread.join(timeout=1.0)
        Flag(self._request.run_dir / STOP_REQUEST).unlink()

    def _run(self) -> None:
        try:
            result = run_training(
                self._request, fit=lambda request, checkpoints: self._train(request, self._take), exports=False
            )
            self._reports.put(self._describe(result))
        except Exception as error:  # whoever waits for the next report must get one
            text = str(error) if isinstance(error, LayerplanError) else f"{type(error).__name__}: {first_line(error)}"
            self._reports.put({"step": self._seen, PERCENT: 100.0, LOSS: math.inf, "error": text, "done": True})

    def _take(self, report: dict[str, Any]) -> None:
        """The one after the last step comes with the result."""
        if self._seen < report["step"] < self._steps:
            add_report(self._request.run_dir, report)
            self._pass_on(report)

    def _pass_on(self, report: dict[str, Any]) -> None:
        self._seen = int(report["step"])
        loss = report.get(self._metric)
        if loss is not None and math.isfinite(loss):
            self._reports.put({**report, PERCENT: 100.0 * self._seen / self._steps, LOSS: loss, "done": False})

    def _describe(self, result: TrainResult) -> dict[str, Any]:
        losses = dict(_list_losses(self._request, result))
        loss = losses.get(self._metric)
        fault = f"{self._metric} was never reported" if loss is None else f"{self._metric} is {loss}"
        is_known = loss is not None and math.isfinite(loss)
        return {
            "step": result.final_step,
            PERCENT: 100.0 * result.final_step / self._steps,
            LOSS: loss if is_known else math.inf,
            **losses,
            "train_loss": result.final_loss,
            "tokens_per_s": result.tokens_per_s,
            "train_s": result.train_s,
            "wall_s": time.perf_counter() - self._began,
            "error": "" if is_known else fault,
            "done": True,
        }


class Replay:
    """A trial that ended, for a scheduler that judges others by it: its reports once more, and nothing trains."""

    def __init__(self, request: TrainRequest, steps: int) -> None:
        assert request.judging is not None, "trials are compared"
        metric, record = request.judging.metric, load_record(request.run_dir)
        last = math.inf if record is None else record.step  # one that was stopped trains on until it hears of it
        reports = [each for each in read_reports(request.run_dir) if int(each["step"]) <= last]
        told = [(int(each["step"]), each.get(metric)) for each in reports]
        if record is not None and not record.was_stopped:
            told.append((record.step, record.judged_by(metric).loss))
        known = [(step, loss) for step, loss in told if loss is not None] or [(0, math.inf)]
        self._left = [
            {"step": step, PERCENT: 100.0 * step / steps, LOSS: loss, "done": place == len(known) - 1}
            for place, (step, loss) in enumerate(known)
        ]

    def next(self) -> dict[str, Any]:
        """The next report; the last one has `done`."""
        return self._left.pop(0)

    def stop(self) -> None:
        """Nothing goes on."""


def _list_losses(request: TrainRequest, result: TrainResult) -> Iterator[tuple[str, float]]:
    assert request.judging is not None
    yield from ((name, each.mean) for name, each in load_losses(Path(request.judging.result)).items())
    if result.validation_loss is not None:
        yield VALIDATION, result.validation_loss


def read_loss(report: Mapping[str, Any]) -> float:
    """What a trial is compared by; infinite when it failed."""
    return float(report.get(LOSS, math.inf))
