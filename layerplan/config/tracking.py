"""Where the lineage of a run is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerplan.config.base import StrictModel


class TrackingConfig(StrictModel):
    """MLflow, a JSONL file, or nothing."""

    backend: Literal["mlflow", "jsonl", "none"] = "mlflow"
    """`jsonl` keeps `metrics.jsonl` only; `mlflow` writes that too."""
    uri: str | None = None
    """MLflow tracking address; left out, `sqlite:///<storage_path>/mlflow.db`."""
    experiment: str = Field(default="layerplan", min_length=1)
    """MLflow experiment."""
