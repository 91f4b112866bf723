"""Secrets of the submitting process that its workers need, on a road that nothing shows.

What stands in a runtime environment is written to Ray's logs and shown by its State API. Workers of a local cluster inherit
the environment of the process that starts it. Those of another cluster are given it as the state of a function that Ray
calls in each new worker: it lies in the control store, which asks for the token, and is shown as its class's name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

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


class SecretEnvironment:
    """Sets variables in the process that calls it; shows their names only."""

    __name__ = "SecretEnvironment"
    """What Ray shows of it."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    def __call__(self) -> None:
        """Sets them, before any task of the worker begins."""
        os.environ.update(self._values)

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._values)

    def __repr__(self) -> str:
        return f"SecretEnvironment({', '.join(self._values)})"


def collect_secrets(environ: Mapping[str, str]) -> SecretEnvironment:
    """Those of `SECRETS` that are set."""
    return SecretEnvironment({name: environ[name] for name in SECRETS if environ.get(name)})
