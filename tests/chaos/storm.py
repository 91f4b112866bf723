"""`make chaos`: seeded faults, as many as are asked for, and a table of what was injected, said and lost.

    python -m tests.chaos.storm --seed 1 --rounds 5 --faults 6 --files 500 --out chaos.md

Ends with 1 when anything was lost. `tests.chaos.report` adds several seeds up.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.machine import describe_machine
from tests.chaos.files import damage_files, fill_disk
from tests.chaos.processes import CHOICES, Fault, Storm, compare_runs, draw_faults
from tests.chaos.report import Report
from tests.chaos.tracking_server import TrackingServer
from tests.tiny_store import make_inputs


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the storms and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="runs that are hurt")
    parser.add_argument("--faults", type=int, default=4, help="faults of processes in each")
    parser.add_argument("--files", type=int, default=200, help="damages to a store, and as many to checkpoints")
    parser.add_argument("--tracking", action="store_true", help="with an MLflow server that is killed too")
    parser.add_argument("--kill", default="", help="only these, such as worker:SIGKILL,driver:SIGTERM, in this order")
    parser.add_argument("--signal", default="", help="draw only faults by this, such as SIGKILL")
    parser.add_argument(
        "--out", type=Path, help="file for the table, such as chaos.md; chaos.json beside it is what can be added up"
    )
    options = parser.parse_args(argv)
    report = Report(options.seed, describe_machine("ray", "torch"))
    started = time.perf_counter()

    def keep() -> None:
        report.seconds = round(time.perf_counter() - started)
        if options.out is not None:
            report.save(options.out.with_suffix(".json"))
            options.out.write_text(report.render(), encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="chaos", ignore_cleanup_errors=True) as name:
        run_all(Path(name), options, report, keep)
    keep()
    print(report.render(), flush=True)
    return int(report.lost > 0)


def run_all(folder: Path, options: argparse.Namespace, report: Report, keep: Callable[[], None]) -> None:
    """Files first, which takes seconds, then one quiet run and the storms; `keep` is called after each of those."""
    draw = random.Random(options.seed)
    if options.files:
        report.outcomes += damage_files(folder / "files", draw, options.files)
    report.outcomes.append(fill_disk(folder / "disk"))
    if not options.rounds:
        return
    make_inputs(folder)
    quiet = Storm(folder, "quiet", [], draw)
    quiet.submit_until_done()
    server = TrackingServer(folder) if options.tracking else None
    try:
        for number in range(options.rounds):
            storm = Storm(folder, f"storm_{number}", list_faults(draw, options), draw, server)
            storm.submit_until_done()
            report.outcomes += [*storm.outcomes, compare_runs(storm.run_dir, quiet.run_dir)]
            report.recoveries += storm.recoveries
            print(f"[chaos] {storm.run}: {len(storm.outcomes)} faults", file=sys.stderr, flush=True)
            keep()
    finally:
        if server is not None:
            server.stop()


def list_faults(draw: random.Random, options: argparse.Namespace) -> list[Fault]:
    """The faults of one storm: those that were named, else drawn ones."""
    if not options.kill:
        choices = tuple(each for each in CHOICES if options.tracking or each[0] != "tracking")
        choices = tuple(each for each in choices if options.signal in ("", each[1].name))
        return draw_faults(draw, options.faults, choices)
    named = [word.split(":") for word in options.kill.split(",")]
    steps = [fault.at for fault in draw_faults(draw, len(named), CHOICES)]
    return [Fault(victim, signal.Signals[number], at) for (victim, number), at in zip(named, steps, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
