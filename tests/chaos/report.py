"""What one seed's storms came to, kept so that several can be added up.

python -m tests.chaos.report 601.json 602.json --out benchmarks/results/chaos.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.chaos.outcomes import Outcome, render_table

KILL = "SIGKILL"
STORM = "a whole storm"
_TITLE = "# Storms of kills, stops and damage, added up"


@dataclass
class Report:
    """Of one seed."""

    seed: int
    machine: dict[str, str | int]
    """Date, commit, processor, as the benchmarks give them."""
    outcomes: list[Outcome] = field(default_factory=list)
    recoveries: list[tuple[int, int]] = field(default_factory=list)
    """(seconds until training went on, seconds of them for the start of a process)."""
    seconds: int = 0

    @property
    def kills(self) -> int:
        """Processes that lived and were killed."""
        return sum(outcome.met and KILL in outcome.injected for outcome in self.outcomes)

    @property
    def storms(self) -> int:
        """Runs that were hurt and compared with the quiet one."""
        return sum(outcome.injected == STORM for outcome in self.outcomes)

    @property
    def equal(self) -> int:
        """Those of them that ended with its ledger and its weights, byte for byte."""
        return sum(outcome.injected == STORM and not outcome.lost for outcome in self.outcomes)

    @property
    def lost(self) -> int:
        """Faults after which something was lost, or a line or an end was missing."""
        return sum(bool(outcome.lost) for outcome in self.outcomes)

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads what `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        values["outcomes"] = [Outcome(**each) for each in values["outcomes"]]
        return cls(**values | {"recoveries": [(whole, start) for whole, start in values["recoveries"]]})

    def render(self) -> str:
        """The table of this seed and two lines below it."""
        return (
            f"{render_table(self.outcomes)}\n\n{describe_recoveries(self.recoveries)}\n"
            f"Seed {self.seed}: {self.equal} of {self.storms} storms ended as the quiet run did, {self.kills} kills met a living"
            f" process, {self.lost} times something was lost or not said, {self.seconds} s.\n"
        )


def add_up(reports: Sequence[Report]) -> str:
    """One page: the sums, one row for each kind of fault, one row for each seed."""
    machines = list(dict.fromkeys(f"{each.machine['cpu']}, {each.machine['cores']} cores" for each in reports))
    outcomes = [outcome for report in reports for outcome in report.outcomes]
    recoveries = [pair for report in reports for pair in report.recoveries]
    sums = {name: sum(getattr(report, name) for report in reports) for name in ("storms", "equal", "kills", "lost")}
    rows = ["| seed | date | commit | storms | equal | kills that met | lost or not said | seconds |"]
    rows += ["|---|---|---|---|---|---|---|---|"]
    for each in reports:
        cells = (
            each.seed,
            each.machine["date"],
            each.machine["commit"],
            each.storms,
            each.equal,
            each.kills,
            each.lost,
        )
        rows.append(f"| {' | '.join(map(str, cells))} | {each.seconds} |")
    return (
        f"{_TITLE}\n\n{sums['kills']} processes that lived were killed in {sums['storms']} storms of {len(reports)} seeds"
        f" on {'; '.join(machines)}.\n{sums['equal']} of {sums['storms']} ended with the ledger and the weights of a quiet run,"
        f" byte for byte; {sums['lost']} times something else was lost or not said.\n"
        f"{describe_recoveries(recoveries)}\n\n{render_table(outcomes)}\n\n" + "\n".join(rows) + "\n"
    )


def describe_recoveries(recoveries: Sequence[tuple[int, int]]) -> str:
    """How long training took to go on after a worker was lost."""
    if not recoveries:
        return "No worker was lost in a run that went on."
    beyond = [whole - start for whole, start in recoveries]
    return (
        f"{len(recoveries)} times training went on by itself after a worker was lost, within"
        f" {max(whole for whole, _ in recoveries)} s at most, {max(beyond)} s beyond the start of a process."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Adds up reports that `tests.chaos.storm --out` left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="file for the page; standard output else")
    options = parser.parse_args(argv)
    page = add_up([Report.load(path) for path in options.reports])
    if options.out is None:
        print(page, end="")
    else:
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
