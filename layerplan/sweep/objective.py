"""One trial of a boundary sweep: train its plan and let Tune see every report.

Runs as a Ray Tune function trainable that launches its own Ray Train run, so it is shipped to a worker and lives in
the library, not in `jobs/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerplan.plan.freeze_plan import FreezePlan
from layerplan.train.metrics import MetricSink
from layerplan.train.trainer import TrainRequest


@dataclass(frozen=True)
class Trial:
    """What one trial trains; made before launch, one per candidate plan."""

    name: str
    """Folder of the trial below the sweep, for example `boundary_03`."""
    plan: FreezePlan
    """The plan it trains."""
    sink_factory: Callable[[int], MetricSink] | None = None
    """Where its metrics go."""


def run_trial(config: Mapping[str, Any], *, request: TrainRequest, trials: Mapping[str, Trial]) -> None:
    """Trains the plan of `config["trial"]`; a trial that is interrupted continues from its own checkpoint.

    Args:
        config: `trial`, the name of one of `trials`.
        request: What all trials share; its `run_dir` is the sweep's folder.
        trials: The candidates by name.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from layerplan.train.trainer import run_training

    trial = trials[config["trial"]]
    result = run_training(
        replace(request, run_dir=Path(request.run_dir) / trial.name, plan=trial.plan, sink_factory=trial.sink_factory),
        callbacks=[TuneReportCallback()],
    )
    tune.report(
        {
            "step": result.final_step,
            "validation_loss": result.validation_loss,
            "train_loss": result.final_loss,
            "tokens_per_s": result.tokens_per_s,
        }
    )
