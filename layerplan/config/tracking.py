"""Where the lineage of a run is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerplan.config.base import StrictModel


class TrackingConfig(StrictModel):
    """MLflow, a JSONL file, or nothing."""

    backend: Literal["mlflow", "jsonl", "none"] = "mlflow"
    """`jsonl` keeps `metrics.jsonl` only; `mlflow` writes that too."""
    uri: str | None = Field(default=None, repr=False)
    """MLflow tracking address; left out, `sqlite:///<storage_path>/mlflow.db`. Credentials in it are written nowhere;
    `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD` or `MLFLOW_TRACKING_TOKEN` in the job's environment serve too."""
    experiment: str = Field(default="layerplan", min_length=1)
    """MLflow experiment."""
    required: bool = False
    """Whether a run may not begin before the store has taken it; left out, it begins and what it logs is sent later."""
