"""What a worker of another cluster does before its first task: it takes the job's folder and the job's secrets.

Workers of a local cluster inherit both from the process that starts it. Those of another cluster stand in the folder where
that was started, so a relative path of a config would mean something else to them. And what stands in a runtime environment
is written to Ray's logs and shown by its State API; so they are given it as the state of a function that Ray calls in each
new worker: it lies in the control store, which asks for the token, and is shown as its class's name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
"""Variables of the submitting process; a worker's machine may have others of its own, which stay."""


class WorkerSetup:
    """Goes to a folder and sets variables in the process that calls it; shows the names of these only."""

    __name__ = "WorkerSetup"
    """What Ray shows of it."""

    def __init__(self, folder: str, secrets: Mapping[str, str]) -> None:
        self._folder = folder
        self._secrets = dict(secrets)

    def __call__(self) -> None:
        """Does it; a worker whose machine has no such folder stays where it is."""
        os.environ.update(self._secrets)
        with suppress(OSError):
            os.chdir(self._folder)

    def __repr__(self) -> str:
        return f"WorkerSetup({self._folder}, {', '.join(self._secrets)})"


def collect_setup(environ: Mapping[str, str]) -> WorkerSetup:
    """This process's folder, and those of `SECRETS` that are set."""
    return WorkerSetup(str(Path.cwd()), {name: environ[name] for name in SECRETS if environ.get(name)})
