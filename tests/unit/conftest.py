"""Unit tests run without Ray, whatever ran before them: code that uses a cluster when there is one works in-process."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_ray() -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store on SQLite that nothing was written to; making its tables takes seconds."""
    from tests.mlflow_server import make_database

    return make_database(tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture
def run_dir(tmp_path: Path, empty_database: Path) -> Path:
    """A run's folder with a store of its own beside it."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def uri(run_dir: Path) -> str:
    """The address of that store."""
    return f"sqlite:///{run_dir.parent / 'mlflow.db'}"


@pytest.fixture
def client(uri: str) -> Any:
    """MLflow's own client of it."""
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)
