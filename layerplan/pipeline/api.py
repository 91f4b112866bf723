"""The chain and two of its stages as calls, for those who do not start from a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.artifacts import Results
from layerplan.config.load import validate_config
from layerplan.config.run import RunConfig
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.plan.layer_profile import LayerProfile


def run(config: RunConfig) -> Path:
    """Runs every stage of a config that is not done yet.

    Returns:
        The run's folder, with `report.html`, `verdicts.json` and the trained model; of a run kept at an address, the local one it
        worked in.

    Raises:
        LayerplanError: When an input cannot be used or a stage fails; what is done is kept.
    """
    from layerplan.pipeline.chain import continue_pretraining

    continue_pretraining(config)
    return locate_run_folder(config).root


def trace_model(model: str, *, storage_path: str = "runs", name: str | None = None, **trace: Any) -> LayerProfile:
    """Measures a model's layers on a local Ray or the one that RAY_ADDRESS names.

    Args:
        model: Folder or hub id.
        storage_path: Folder that holds runs.
        name: Name of the run's folder; the model's own when left out.
        trace: Fields of `TraceConfig`.

    Returns:
        The profile, which lies in the run's folder beside the plan made of it and `report.html`.

    Raises:
        LayerplanError: When the model cannot be traced.
    """
    from layerplan.pipeline.trace_layers import trace_layers

    values = {"name": name or Path(model).name, "storage_path": storage_path, "trace": trace}
    config = validate_config(values | {"model": {"type": "pretrained", "name": model}})
    trace_layers(config)
    return LayerProfile.load(locate_run_folder(config).profile)


def evaluate(model: str, out: str, **evaluation: Any) -> Results:
    """Scores a model on C-Eval and CMMLU.

    Args:
        model: Folder or hub id.
        out: Folder for scores and answers.
        evaluation: Fields of `EvaluationConfig`.

    Returns:
        Scores by `benchmark/protocol`.

    Raises:
        LayerplanError: When the model or a benchmark cannot be used.
    """
    from layerplan.pipeline.evaluate import score_model
    from layerplan.pipeline.model_options import find_base

    values = {"name": "evaluate", "model": {"type": "pretrained", "name": model}, "evaluation": evaluation}
    config = validate_config(values)
    return score_model(config, find_base(config), out)
