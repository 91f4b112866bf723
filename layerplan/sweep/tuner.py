"""Ray Tune over boundaries: every trial is one Ray Train run with its own plan, and an interrupted sweep continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from layerplan.artifacts import compute_sha256
from layerplan.config.sweep import SweepConfig
from layerplan.errors import TrainingError
from layerplan.run_folder import TUNE_PREFIX
from layerplan.sweep.objective import Trial, run_trial
from layerplan.train.trainer import TrainRequest

DRIVER_CPUS = 0.1
"""A trial's driver only waits for its workers."""


@dataclass(frozen=True)
class TrialResult:
    """How one trial ended."""

    name: str
    boundary: int
    step: int
    validation_loss: float | None
    train_loss: float
    tokens_per_s: float | None
    flops_share: float
    """Predicted FLOPs per token as a share of full training."""


def run_sweep(
    config: SweepConfig,
    request: TrainRequest,
    trials: Sequence[Trial],
    on_finished: Callable[[TrialResult], None] = lambda result: None,
) -> list[TrialResult]:
    """Runs every trial and returns their results, best first.

    Args:
        config: The sweep.
        request: What all trials share.
        trials: The candidates.
        on_finished: Called with each trial that came to its end, before an error is raised for those that did not.

    Raises:
        TrainingError: When a trial fails; the message carries its own.
    """
    by_name = {trial.name: trial for trial in trials}
    grid = _make_tuner(config, request, by_name).fit()
    results = [_read_result(result.metrics or {}, by_name) for result in grid if result.error is None]
    for result in results:
        on_finished(result)
    failed = [result.error for result in grid if result.error is not None]
    if failed:
        raise TrainingError(f"sweep: {len(failed)} of {len(trials)} trials failed; the first: {failed[0]}") from failed[
            0
        ]
    return sorted(results, key=lambda item: (item.validation_loss is None, item.validation_loss, item.name))


def name_search(config: SweepConfig, trials: Sequence[str]) -> str:
    """The name of Tune's own folder: another one for another search, since a restored search knows only its first trials.

    A trial that was trained under an earlier search is read back or goes on from its checkpoint, as its folder stays.
    """
    content = [sorted(trials), config.scheduler, config.max_concurrent_trials]
    return f"{TUNE_PREFIX}{compute_sha256(content)[:12]}"


def _make_tuner(config: SweepConfig, request: TrainRequest, trials: Mapping[str, Trial]) -> Any:
    from ray import tune

    trainable = tune.with_resources(partial(run_trial, request=request, trials=dict(trials)), {"CPU": DRIVER_CPUS})
    name = name_search(config, list(trials))
    path = Path(request.run_dir) / name
    if tune.Tuner.can_restore(str(path)):
        return tune.Tuner.restore(str(path), trainable=trainable, resume_unfinished=True, restart_errored=True)
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(
            metric="validation_loss",
            mode="min",
            max_concurrent_trials=config.max_concurrent_trials,
            scheduler=_make_scheduler(config),
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(request.run_dir), verbose=0),
    )


def _make_scheduler(config: SweepConfig) -> Any:
    if config.scheduler == "none":
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(time_attr="step", max_t=config.max_steps, grace_period=max(1, config.max_steps // 4))


def _read_result(metrics: Mapping[str, Any], trials: Mapping[str, Trial]) -> TrialResult:
    trial = trials[metrics["config"]["trial"]]
    predicted = trial.plan.predicted_cost
    assert predicted is not None, "a trial's plan is priced when it is made"
    return TrialResult(
        name=trial.name,
        boundary=int(trial.name.rpartition("_")[2]),
        step=int(metrics["step"]),
        validation_loss=metrics.get("validation_loss"),
        train_loss=float(metrics["train_loss"]),
        tokens_per_s=metrics.get("tokens_per_s"),
        flops_share=predicted.flops_share,
    )
