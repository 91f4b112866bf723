"""`make chaos`: seeded faults, as many as are asked for, and a table of what was injected, said and lost.

    python -m tests.chaos.storm --seed 1 --rounds 5 --faults 6 --files 500 --out chaos.md

Ends with 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.files import damage_files, fill_disk
from tests.chaos.outcomes import Outcome, render_table
from tests.chaos.processes import CHOICES, Fault, Storm, compare_runs, draw_faults
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
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="chaos", ignore_cleanup_errors=True) as name:
        outcomes, recoveries = run_all(Path(name), options)
    text = render_table(outcomes) + "\n\n" + describe_recoveries(recoveries)
    text += f"\nSeed {options.seed}, {len(outcomes)} lines of outcome, {time.perf_counter() - started:.0f} s.\n"
    print(text, flush=True)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return int(any(outcome.lost for outcome in outcomes))


def run_all(folder: Path, options: argparse.Namespace) -> tuple[list[Outcome], list[tuple[int, int]]]:
    """Files first, which takes seconds, then one quiet run and the storms."""
    draw = random.Random(options.seed)
    outcomes = damage_files(folder / "files", draw, options.files) if options.files else []
    outcomes.append(fill_disk(folder / "disk"))
    recoveries: list[tuple[int, int]] = []
    if not options.rounds:
        return outcomes, recoveries
    make_inputs(folder)
    quiet = Storm(folder, "quiet", [], draw)
    quiet.submit_until_done()
    server = TrackingServer(folder) if options.tracking else None
    try:
        for number in range(options.rounds):
            storm = Storm(folder, f"storm_{number}", list_faults(draw, options), draw, server)
            storm.submit_until_done()
            outcomes += [*storm.outcomes, compare_runs(storm.run_dir, quiet.run_dir)]
            recoveries += storm.recoveries
            print(f"[chaos] {storm.run}: {len(storm.outcomes)} faults", file=sys.stderr, flush=True)
    finally:
        if server is not None:
            server.stop()
    return outcomes, recoveries


def list_faults(draw: random.Random, options: argparse.Namespace) -> list[Fault]:
    """The faults of one storm: those that were named, else drawn ones."""
    if not options.kill:
        choices = CHOICES if options.tracking else tuple(each for each in CHOICES if each[0] != "tracking")
        return draw_faults(draw, options.faults, choices)
    named = [word.split(":") for word in options.kill.split(",")]
    steps = [fault.at for fault in draw_faults(draw, len(named), CHOICES)]
    return [Fault(victim, signal.Signals[number], at) for (victim, number), at in zip(named, steps, strict=True)]


def describe_recoveries(recoveries: Sequence[tuple[int, int]]) -> str:
    """How long training took to go on after a worker was lost."""
    if not recoveries:
        return "No worker was lost in a run that went on."
    beyond = [whole - start for whole, start in recoveries]
    return (
        f"{len(recoveries)} times training went on by itself after a worker was lost, within"
        f" {max(whole for whole, _ in recoveries)} s at most, {max(beyond)} s beyond the start of a process."
    )


if __name__ == "__main__":
    sys.exit(main())
