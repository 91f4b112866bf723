"""Starts a test file as a script that brings its own Ray up, so that it can be killed without harm to the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]


def script_environment(**extra: str) -> dict[str, str]:
    """The environment of a process that starts Ray or talks to one."""
    env = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return env | extra


def start_script(script: str, *arguments: object, output: TextIO, **extra: str) -> subprocess.Popen[str]:
    """Starts `script` and writes what it says to `output`; `extra` are variables of its environment."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(
        command, env=script_environment(**extra), stdout=output, stderr=subprocess.STDOUT, text=True
    )


def run_script(script: str, *arguments: object, timeout_s: float, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs `script` to its end, whatever that is; `extra` are variables of its environment.

    Raises:
        subprocess.TimeoutExpired: When it takes longer than `timeout_s`.
    """
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=script_environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
