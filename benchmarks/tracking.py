"""What a dead tracking server costs a training: `python benchmarks/tracking.py`.

Two things can cost: the process that trains, which appends a line per logged step, and the process beside the job, which
asks the store now and then. CPU time is measured, not wall time, since a shared machine moves the latter more than 2 %.
Steps are matrix products of the same work; with and without tracking they take turns in one process.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from machine import describe_machine

from layerplan.config.tracking import TrackingConfig
from layerplan.tracking.tracker import RunSinkFactory, open_tracker

STEP_S = 0.1
VALUES = {f"train/value_{index}": 0.1234567 * index for index in range(14)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    print(describe_machine())
    matrix = np.random.default_rng(0).random((256, 256), dtype=np.float32)
    repeats = find_repeats(matrix)
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as silent:  # takes connections and never answers, as a stopped server does
        addresses = {
            "refuses": "http://127.0.0.1:9",
            "does not answer": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        for name, uri in addresses.items():
            measure(name, TrackingConfig(uri=uri), lambda: work(matrix, repeats), args.seconds)


def measure(name: str, config: TrackingConfig, step: Callable[[], None], seconds: float) -> None:
    """Prints the CPU seconds of steps with a sink beside a dead store, as a share of those without."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        tracker = open_tracker(config, run_dir, "run", lambda line: None)
        sink = RunSinkFactory(run_dir / "metrics.jsonl", "train", tracker.child("train"))(0)
        beside = psutil.Process().children()[-1]
        spent, started, number = {True: 0.0, False: 0.0}, time.monotonic(), 0
        while time.monotonic() - started < seconds:
            number += 1
            before = time.thread_time()
            step()
            if number % 2:
                sink.log_metrics(VALUES, number)
            spent[bool(number % 2)] += time.thread_time() - before
        times = beside.cpu_times()
        wall, sender_s = time.monotonic() - started, times.user + times.system
        tracker.close("FAILED")
    print(
        f"{name}: {number} steps; a step that logs takes {spent[True] / spent[False] - 1:+.2%} CPU time; the process beside"
        f" took {sender_s:.2f} CPU s in {wall:.0f} s, {sender_s / wall:.2%} of a core"
    )


def work(matrix: np.ndarray, repeats: int) -> None:
    for _ in range(repeats):
        matrix @ matrix


def find_repeats(matrix: np.ndarray) -> int:
    """How many products make a step of about `STEP_S`."""
    started = time.thread_time()
    work(matrix, 20)
    return max(1, round(20 * STEP_S / (time.thread_time() - started)))


if __name__ == "__main__":
    main()
