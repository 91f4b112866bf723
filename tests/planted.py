"""Secrets that stand where secrets stand, and the search for where else they are."""

from __future__ import annotations

import subprocess
from pathlib import Path

PLANTED = {
    "HF_TOKEN": "hf_plantedKqZ41token",
    "AWS_SECRET_ACCESS_KEY": "plantedKqZ41aws",
    "MLFLOW_TRACKING_PASSWORD": "plantedKqZ41mlflow",
}
MARK = "plantedKqZ41"
"""A part of all of them."""


def find_files_with(mark: str, *folders: Path) -> list[str]:
    """Files below the folders that hold the mark."""
    command = ["grep", "-rlaF", mark, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()
