"""The nested runs of a sweep in the lineage: one per trial, through every job that works on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerplan.report.lineage import list_trial_results
from layerplan.run_folder import PLAN_NAME, RunFolder
from layerplan.sweep.objective import Trial
from layerplan.sweep.space import Point, describe_ends
from layerplan.tracking.outbox import Status
from layerplan.tracking.tracker import Tracker, status_of
from layerplan.train.judge import VALIDATION
from layerplan.train.trial_record import TrialRecord

logger = logging.getLogger(__name__)

LOST = "its process was lost; submit the same name again to go on"


class TrialRuns:
    """Opens the run of a trial that begins, and gives one that ended its numbers and its record."""

    def __init__(self, tracker: Tracker, sweep: Path, trials: Mapping[str, Trial], texts: list[str]) -> None:
        self._tracker = tracker
        self._sweep = sweep
        self._trials = trials
        self._texts = texts
        self._open: dict[str, Tracker] = {}
        self.failed: list[TrialRecord] = []
        """Trials that ended with an error, in order."""

    def begin(self, point: Point) -> None:
        """Opens or continues the trial's run, and writes its plan."""
        trial, folder = self._trials[point.name], RunFolder(self._sweep / point.name)
        if not folder.plan.exists():
            trial.plan.save(folder.plan)
        child = self._open[point.name] = self._tracker.child(f"sweep_{point.name}")
        child.follow(folder.metrics, point.name)
        values = {"boundary": point.boundary, "freeze": point.freeze, "ends": describe_ends(point.ends)}
        child.log_params(
            values
            | {"learning_rate": point.learning_rate, "seed": point.seed, "max_steps": trial.steps}
            | {"plan_sha256": trial.plan.sha256}
        )
        child.set_tags({"layerplan.plan_sha256": trial.plan.sha256, "layerplan.plan_type": trial.plan.plan_type})
        child.log_artifact(folder.root / PLAN_NAME)
        logger.info("%s begins: %d steps", point.name, trial.steps, extra={"stage": "sweep"})

    def end(self, point: Point, report: dict[str, Any] | None) -> None:
        """Closes the trial's run with its numbers, then writes its record: what is recorded is not run again."""
        record = make_record(self._trials[point.name], report, self._texts)
        run = self._open.pop(point.name)
        run.log_metrics(list_trial_results(record.model_dump()), step=record.step)
        run.set_tags({"layerplan.trial": _describe_end(record)})
        run.close(status="FAILED" if record.error else "FINISHED")
        logger.info("%s %s", point.name, _describe_end(record), extra={"stage": "sweep"})
        if record.error:
            self.failed.append(record)
        else:
            record.save(self._sweep / point.name)

    def close(self, status: Status) -> None:
        """Ends the runs that are left when the sweep ends without their trials."""
        for run in self._open.values():
            run.close(status=status)
        self._open.clear()


@contextmanager
def closing_runs(runs: TrialRuns) -> Iterator[TrialRuns]:
    """Closes what is left open, as finished, failed or killed."""
    try:
        yield runs
    except BaseException as error:
        runs.close(status_of(error))
        raise
    runs.close("FAILED")


def make_record(trial: Trial, report: dict[str, Any] | None, texts: list[str]) -> TrialRecord:
    """A trial's last report as its record; without one, that its actor was lost.

    Args:
        trial: The trial.
        report: What it said last.
        texts: Names of the held-out texts.
    """
    said = report or {"step": 0, "error": LOST}
    cost, point = trial.plan.predicted_cost, trial.point
    assert cost is not None, "a trial's plan is priced when it is made"
    error = str(said.get("error") or "")
    return TrialRecord(
        name=point.name,
        boundary=point.boundary,
        freeze=point.freeze,
        ends=describe_ends(point.ends),
        learning_rate=point.learning_rate,
        seed=point.seed,
        step=int(said["step"]),
        max_steps=trial.steps,
        loss=None if error else float(said["loss"]),
        validation_loss=said.get(VALIDATION),
        text_losses={name: said[name] for name in texts if said.get(name) is not None},
        train_loss=said.get("train_loss"),
        tokens_per_s=said.get("tokens_per_s"),
        train_s=said.get("train_s"),
        wall_s=said.get("wall_s"),
        flops_share=cost.flops_share,
        flops=trial.flops,
        error=error,
    )


def _describe_end(record: TrialRecord) -> str:
    if record.error:
        return f"failed: {record.error}"
    assert record.loss is not None
    if record.was_stopped:
        return f"was stopped at step {record.step} of {record.max_steps}, loss {record.loss:.4f}"
    wall = (
        ""
        if record.wall_s is None or record.train_s is None
        else (f", {record.wall_s:.0f} s, {record.train_s:.0f} s of it in steps")
    )
    return f"ended with loss {record.loss:.4f}{wall}"
