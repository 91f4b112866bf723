"""Faults of processes: training workers, controller, driver, raylet and head killed or stopped, and files damaged in between.

A storm is one run that is hurt at steps drawn from its seed and submitted again until it ends. Its ledger and its weights must be
those of a quiet run. The seed fixes what is done at which step; how far a process is at that moment is the machine's matter.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from layerplan.checkpoint.index import list_checkpoints
from tests.chaos.driver import Driver
from tests.chaos.files import KINDS
from tests.chaos.outcomes import Outcome
from tests.chaos.tracking_server import TrackingServer
from tests.chaos.victim import HOLD_NAME, MAX_STEPS
from tests.chaos.victims import end_all, find_family, go_on, hurt, is_victim, name_process
from tests.worker_zygote import share_zygotes

TIMEOUT_S = 900
"""Of one submission: a driver that hangs for longer is one thing lost."""
MOST_SUBMISSIONS = 12
WORDS = re.compile(
    r"^error: |\[watch\] no progress|is set aside|was never finished|stopped by|does not answer any more"
)
AGAIN = "submit the same"
RECOVERED = re.compile(r"\[watch\] training goes on at step \d+, (\d+) s after a worker was lost, (\d+) s of which")
ENDS_THE_RUN = ("driver", "raylet", "head", "controller")
OUTLIVE_S = 60
"""How long processes may take to end after their run has."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
AGENTS_OUTLIVE_S = 90
"""Ray's agents tell all drivers that their raylet is gone, and wait 60 s for a head that is gone too."""
LOOK_EVERY_S = 0.2
"""How often a storm looks whether something is due; a look at all processes takes a tenth of it."""


@dataclass(frozen=True)
class Fault:
    """What is done once the ledger has so many steps."""

    victim: str
    signal: signal.Signals
    at: int

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.victim}: {self.signal.name}"


@dataclass(frozen=True)
class Hit:
    """A fault that was done to a process that lived."""

    fault: Fault
    position: int
    """Of the submission's output when it was done."""
    process: psutil.Process

    @property
    def ends_the_run(self) -> bool:
        """Whether the submission cannot go on."""
        return self.fault.victim in ENDS_THE_RUN


CHOICES: tuple[tuple[str, signal.Signals], ...] = (
    ("worker", signal.SIGKILL),
    ("driver", signal.SIGKILL),
    ("worker", signal.SIGSTOP),
    ("driver", signal.SIGTERM),
    ("controller", signal.SIGKILL),
    ("raylet", signal.SIGKILL),
    ("head", signal.SIGKILL),
    ("tracking", signal.SIGKILL),
    *[("worker", signal.SIGKILL)] * 5,
)
"""Drawn without putting back, until all are; workers are what a cluster has most of."""


def draw_faults(draw: random.Random, number: int, choices: tuple[tuple[str, signal.Signals], ...]) -> list[Fault]:
    """So many faults over the steps of one run, in order; all choices come before one comes again."""
    steps = sorted(draw.sample(range(2, MAX_STEPS - 3), number))
    kinds = [kind for _ in range(number) for kind in draw.sample(choices, len(choices))][:number]
    return [Fault(victim, number, at) for (victim, number), at in zip(kinds, steps, strict=True)]


@dataclass
class Storm:
    """One run, its faults, and what came of them."""

    folder: Path
    """Has `base` and `store`; the run lies beside them."""
    run: str
    faults: list[Fault]
    draw: random.Random
    server: TrackingServer | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    recoveries: list[tuple[int, int]] = field(default_factory=list)
    """(seconds until training went on, seconds of them for the start of a process)."""
    _family: list[psutil.Process] = field(default_factory=list)
    """The driver and its processes when they were last hurt."""
    _doomed: set[psutil.Process] = field(default_factory=set)
    """Workers of an attempt that was hurt: they end with it, so killing one of them too would be no fault of its own."""
    _leaving: list[tuple[psutil.Process, float]] = field(default_factory=list)
    """Agents that will end by themselves, and when they must have."""

    @property
    def run_dir(self) -> Path:
        """Of the run."""
        return self.folder / self.run

    def submit_until_done(self) -> None:
        """Submits, hurts, damages, submits again."""
        share_zygotes()
        self._submit_again()
        for agent, deadline in self._leaving:
            self._end_late([agent], deadline - time.monotonic(), AGENTS_OUTLIVE_S)

    def _submit_again(self) -> None:
        for number in range(MOST_SUBMISSIONS):
            done, damage = self._submit(number)
            if done:
                self.outcomes += [Outcome(fault.name, "skipped: the run was over", met=False) for fault in self.faults]
                return
            if damage is not None:
                self.outcomes.append(damage)
        self.outcomes.append(Outcome("the run", "", f"not finished after {MOST_SUBMISSIONS} submissions"))

    def _submit(self, number: int) -> tuple[bool, Outcome | None]:
        """One submission to its end; whether the run is done, and the damage its end was used for."""
        output = self.folder / f"{self.run}_{number}.txt"
        output.touch()
        (self.folder / HOLD_NAME).unlink(missing_ok=True)
        arguments = [str(self.folder), self.run, *([self.server.address] if self.server else [])]
        process = Driver(arguments, output, RAY_TMPDIR=str(self.folder / "ray"))
        hits: list[Hit] = []
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while process.poll() is None and time.monotonic() < deadline:
                self._hurt_when_due(process, hits, output)
                time.sleep(LOOK_EVERY_S)
        finally:
            hung = process.poll() is None
            end_all(find_family(process.pid) if hung else [])
        returncode = process.wait()
        if hung:
            self.outcomes.append(Outcome("a submission", output.name, f"it hung for {TIMEOUT_S} s"))
        self._outlive(hits)
        text = output.read_text(errors="replace")
        self.recoveries += [(int(whole), int(start)) for whole, start in RECOVERED.findall(text)]
        self.outcomes += judge_all(hits, text, returncode)
        if returncode == 0:
            return True, None
        if not hits:
            last = text.strip().splitlines()[-1] if text.strip() else "no output"
            self.outcomes.append(Outcome("nothing", last, f"the run ended by itself with {returncode}"))
        return False, self._damage_between()

    def _hurt_when_due(self, process: Driver, hits: list[Hit], output: Path) -> None:
        ledger = self.run_dir / "ledger.jsonl"
        steps = len(ledger.read_text().splitlines()) if self.faults and ledger.exists() else 0
        if not self.faults or steps < self.faults[0].at or (hits and hits[-1].ends_the_run):
            return
        fault = self.faults[0]
        if fault.victim == "tracking":
            self._hurt_server(self.faults.pop(0))
            return
        self._family = find_family(process.pid)
        victims = [each for each in self._family if is_victim(each, fault.victim, process.pid)]
        victims = [each for each in victims if each not in self._doomed]
        if not victims:  # it is starting: what was due while the run was down meets a run that comes up
            return
        position = output.stat().st_size
        victim = self.draw.choice(sorted(victims, key=lambda each: each.pid))
        if hurt(victim, fault.signal):
            hits.append(Hit(self.faults.pop(0), position, victim))
            self._doomed.update(victims)
            if fault.victim in ("raylet", "head"):
                (self.folder / HOLD_NAME).touch()

    def _hurt_server(self, fault: Fault) -> None:
        if self.server is None:
            self.outcomes.append(Outcome(fault.name, "skipped: without a tracking server", met=False))
            return
        self.server.restart()
        self.outcomes.append(Outcome(fault.name, f"the server was away for {self.server.away_s:.0f} s"))

    def _outlive(self, hits: list[Hit]) -> None:
        """What is left of a run that was ended is one thing lost, and ended; what stood still first goes on."""
        if not hits or not hits[-1].ends_the_run:
            return
        go_on([hit.process for hit in hits if hit.fault.signal == signal.SIGSTOP])
        agents = [each for each in self._family if name_process(each).startswith(AGENTS)]
        self._leaving += [(agent, time.monotonic() + AGENTS_OUTLIVE_S) for agent in agents]
        self._end_late([each for each in self._family if each not in agents], OUTLIVE_S, OUTLIVE_S)

    def _end_late(self, processes: list[psutil.Process], wait_s: float, limit_s: int) -> None:
        _, alive = psutil.wait_procs(processes, timeout=max(0, wait_s))
        if alive:
            names = ", ".join(sorted({name_process(each) for each in alive}))
            self.outcomes.append(Outcome("processes that outlive the run", names, f"{len(alive)} after {limit_s} s"))
            end_all(alive)

    def _damage_between(self) -> Outcome | None:
        """Half of the times: a file of the newest of several checkpoints is damaged, or Ray's own index is gone."""
        whole = list_checkpoints(self.run_dir / "checkpoints")
        if len(whole) < 2 or self.draw.random() < 0.5:
            return None
        file = self.draw.choice(
            sorted(path for path in whole[0].iterdir() if path.name.startswith(("__", ".meta", "s")))
        )
        kind = self.draw.choice(sorted(KINDS))
        file.write_bytes(KINDS[kind](file.read_bytes(), self.draw))
        (self.run_dir / "checkpoints" / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
        return Outcome(f"newest checkpoint between submissions: {kind}", f"{file.parent.name}/{file.name}")


def judge_all(hits: list[Hit], text: str, returncode: int) -> list[Outcome]:
    """What came of the faults of one submission, of which only the last can have ended it."""
    if not hits:
        return []
    cut_short = hits[-1].ends_the_run
    earlier = [judge(hit, text, 0, cut_short=cut_short) for hit in hits[:-1]]
    return [*earlier, judge(hits[-1], text, returncode, cut_short=False)]


def judge(hit: Hit, text: str, returncode: int, *, cut_short: bool) -> Outcome:
    """What was said after a fault, and whether that was enough; nothing may have been said yet when another ended the run."""
    fault = hit.fault
    before, after = (
        part.decode(errors="replace") for part in (text.encode()[: hit.position], text.encode()[hit.position :])
    )
    trained, after = "[train] step " in before, after.splitlines()
    words = [line for line in after if WORDS.search(line) or RECOVERED.search(line)]
    said = words[0] if words else f"(exit status {returncode})"
    lost = ""
    if fault.victim == "controller" and returncode and not any(AGAIN in line for line in after):
        lost = "no word that submitting again continues"
    if fault.victim == "worker" and fault.signal == signal.SIGKILL and trained and not cut_short:
        lost = "" if any(RECOVERED.search(line) for line in after) else "that training went on was not told"
    if fault.signal == signal.SIGSTOP and not cut_short and not any("[watch] no progress" in line for line in after):
        lost = "the stop was not told"
    if returncode == 1 and not any(line.startswith("error: ") or AGAIN in line for line in after):
        lost = lost or f"no line of ours at its end: {after[-1] if after else ''}"
    met = fault.signal != signal.SIGTERM or returncode != 0  # one that had nothing left to end came too late
    return Outcome(fault.name, said, lost, met)


def compare_runs(storm: Path, quiet: Path) -> Outcome:
    """The two things that a storm must not change."""
    results = [run / "training.json" for run in (storm, quiet)]
    if not all(result.exists() for result in results):
        return Outcome("a whole storm", "", "the run itself")
    folders = [run / json.loads(result.read_text())["hf_dir"] for run, result in zip((storm, quiet), results)]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    ledgers = [(run / "ledger.jsonl").read_text() for run in (storm, quiet)]
    lost = [name for name, pair in (("weights", weights), ("ledger", ledgers)) if pair[0] != pair[1]]
    said = (
        f"ledger of {len(ledgers[0].splitlines())} steps and {len(weights[0]):,} bytes of weights equal the quiet run's"
    )
    return Outcome("a whole storm", "" if lost else said, " and ".join(f"other {name}" for name in lost))
