"""Starts a test file as a script that brings its own Ray up, so that it can be killed without harm to the tests."""

from __future__ import annotations

import os
import socket
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


def run_two_workers(script: str, *arguments: str) -> list[str]:
    """Runs `script` twice side by side as the ranks of a gloo group, both to a good end, and returns what each said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = script_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", WORLD_SIZE="2")
    workers = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=env | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=400)[0] for worker in workers]
    for worker, output in zip(workers, outputs):
        assert worker.returncode == 0, output[-3000:]
    return outputs


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
