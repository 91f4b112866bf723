"""What a dead tracking server costs a training: `python benchmarks/tracking.py`.

Two things can cost: the process that trains, which appends a line per logged step, and the process beside the job, which asks
the store now and then. CPU time is measured, not wall time, which a shared machine moves by more than 2 %.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from machine import describe_machine

from layerplan.config.tracking import TrackingConfig
from layerplan.tracking.tracker import RunSinkFactory, Tracker, open_tracker

VALUES = {f"train/value_{index}": 0.1234567 * index for index in range(14)}
LINES = 1000
ROUNDS = 3


@dataclass
class Case:
    """A run beside one kind of store."""

    name: str
    tracker: Tracker
    sink: Any
    beside: psutil.Process | None

    def cpu_s(self) -> float:
        return 0.0 if self.beside is None else sum(self.beside.cpu_times()[:2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=90.0)
    args = parser.parse_args()
    print(describe_machine())
    with socket.create_server(("127.0.0.1", 0)) as silent, tempfile.TemporaryDirectory() as folder:
        configs = {
            "no store": TrackingConfig(backend="none"),
            "a store that refuses": TrackingConfig(uri="http://127.0.0.1:9"),
            # takes connections and never answers, as a stopped server does
            "a store that hangs": TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"),
        }
        cases = [open_case(Path(folder) / str(index), *item) for index, item in enumerate(configs.items())]
        for turn in range(ROUNDS):
            for case in cases:
                print(
                    f"{case.name}: {time_lines(case, turn * LINES):.1f} us of CPU time per logged step of the trainer"
                )
        before, started = [case.cpu_s() for case in cases], time.monotonic()
        time.sleep(args.seconds)
        for case, spent in zip(cases[1:], before[1:]):
            share = (case.cpu_s() - spent) / (time.monotonic() - started)
            print(f"{case.name}: the process beside took {case.cpu_s():.2f} CPU s in all, then {share:.3%} of a core")
        for case in cases:
            case.tracker.close("FAILED")


def open_case(run_dir: Path, name: str, config: TrackingConfig) -> Case:
    """Opens a run and finds the process beside it."""
    run_dir.mkdir()
    tracker = open_tracker(config, run_dir, "run", lambda line: None)
    beside = None if config.backend == "none" else psutil.Process().children()[-1]
    return Case(name, tracker, RunSinkFactory(run_dir / "metrics.jsonl", "train", tracker.child("train"))(0), beside)


def time_lines(case: Case, step: int) -> float:
    """Microseconds of CPU time per line."""
    started = time.thread_time()
    for number in range(LINES):
        case.sink.log_metrics(VALUES, step + number + 1)
    return (time.thread_time() - started) / LINES * 1e6


if __name__ == "__main__":
    main()
