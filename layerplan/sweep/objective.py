"""One trial of a boundary sweep: make the plan, train it, and report the validation loss.

Runs as a Ray Tune function trainable that launches its own Ray Train run, so it is shipped to a worker and lives in
the library, not in `jobs/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerplan.plan.freeze_plan import FreezePlan


@dataclass(frozen=True)
class Trial:
    """What one trial trains; made before launch, one per candidate plan."""

    name: str
    """Folder of the trial below the sweep, for example `boundary_03`."""
    plan: FreezePlan
    """The plan it trains."""


def run_trial(config: Mapping[str, Any]) -> None:
    """Trains `config["trial"]`'s plan with `config["request"]` and lets Tune see every report.

    Args:
        config: `trial` (a `Trial`), `request` (a `TrainRequest` whose run_dir is the sweep's folder).
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from layerplan.train.trainer import run_training

    trial: Trial = config["trial"]
    request = config["request"]
    run_dir = Path(request.run_dir) / trial.name
    sinks = config.get("sink_factories", {})
    result = run_training(
        replace(request, run_dir=run_dir, plan=trial.plan, sink_factory=sinks.get(trial.name)),
        callbacks=[TuneReportCallback()],
    )
    tune.report(
        {
            "step": result.final_step,
            "validation_loss": result.validation_loss,
            "train_loss": result.final_loss,
            "tokens_per_s": result.tokens_per_s,
            "train_s": result.train_s,
        }
    )
