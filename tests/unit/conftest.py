"""Unit tests run without Ray, whatever ran before them: code that uses a cluster when there is one works in-process."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_ray() -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
