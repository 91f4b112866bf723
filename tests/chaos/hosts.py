"""`make chaos-hosts`: faults of hosts that are hosts (`tests/network_hosts.py`), and a table of what was done, said and lost.

    sudo -E python -m tests.chaos.hosts --seed 1 --rounds 1 --out hosts.md

Three hosts, each with a raylet, train with two workers; the first host has the head and the program. Each fault falls on a run
of its own, and the run is held against a quiet one: the ledger and the weights byte for byte. A round is every fault once.
Ends with 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerplan.errors import LayerplanError
from tests.integration.test_hosts import check_rows, find_step, start_rays, start_training, wait_for
from tests.network_hosts import START_S, Host, Network, running_hosts, why_not
from tests.tiny_store import make_inputs

LOST = "after a worker was lost"
PAUSED, AWAY = "training stood still for", "nothing was heard of"
SLOWED = "times as long as at first"
CUT_S = 20
STEPS = 60
"""Of half a second and more: a lost raylet's workers go on for some seconds, and must not have reached the end by then."""
SLOW_MBITS = 1


@dataclass(frozen=True)
class Fault:
    """What is done to a host that has a worker."""

    name: str
    inflict: Callable[[Network, Host, random.Random], None]
    said: tuple[str, ...]
    """One of these is said."""
    steps: range = range(3, 12)
    """In one of which it falls."""
    ends_host: bool = False
    """Whether another host has to take its place for the next run."""


def kill_worker(network: Network, host: Host, rng: random.Random) -> None:
    """SIGKILL of a training worker."""
    os.kill(rng.choice(host.find("ray::RayTrainWorker")), signal.SIGKILL)


def kill_raylet(network: Network, host: Host, rng: random.Random) -> None:
    """SIGKILL of the raylet; its workers end with it."""
    os.kill(host.find("raylet/raylet", "--raylet_socket_name")[0], signal.SIGKILL)


def kill_host(network: Network, host: Host, rng: random.Random) -> None:
    """The power goes: every process at once, the network with it."""
    host.kill()


def cut_for_a_while(network: Network, host: Host, rng: random.Random) -> None:
    """The cable is pulled for 20 s."""
    host.cut()
    time.sleep(CUT_S)
    host.mend()


def cut_for_good(network: Network, host: Host, rng: random.Random) -> None:
    """The cable is pulled and stays so."""
    host.cut()


def slow_link(network: Network, host: Host, rng: random.Random) -> None:
    """A tenth of what training sends, from now on."""
    host.limit(SLOW_MBITS)


FAULTS = (
    Fault("worker killed", kill_worker, (LOST,)),
    Fault("raylet killed", kill_raylet, (LOST,), ends_host=True),
    Fault("host killed", kill_host, (LOST,), ends_host=True),
    Fault("link cut for 20 s", cut_for_a_while, (PAUSED, AWAY, LOST)),
    Fault("link cut for good", cut_for_good, (LOST,), ends_host=True),
    Fault(f"link of {SLOW_MBITS} Mb/s", slow_link, (SLOWED,), range(24, 40), ends_host=True),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    fault: str
    step: int
    """Of which it fell in."""
    seconds: float
    """From the fault to the end of training."""
    submissions: int
    said: str
    lost: str
    """What differs from the quiet run, or was not said; empty when nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="faults whose names begin so, separated by commas")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args(argv)
    if fault := why_not():
        print(f"skipped: {fault}")
        return 0
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    rng = random.Random(options.seed)
    chosen = [each for each in FAULTS if each.name.startswith(tuple(options.only.split(",")))]
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="lphosts") as folder, running_hosts(3, Path(folder)) as network:
        make_inputs(Path(folder))
        print(f"three raylets started in {start_rays(network.hosts):.0f} s", flush=True)
        quiet = train(network, Path(folder), "quiet", None, rng)
        assert not quiet.lost, quiet
        for round_ in range(options.rounds):
            for fault in rng.sample(chosen, len(chosen)):
                run = f"run_{round_}_{FAULTS.index(fault)}"
                outcomes.append(train(network, Path(folder), run, fault, rng))
                print(render_row(outcomes[-1]), flush=True)
    table = render(outcomes, options.seed)
    print(table)
    if options.out is not None:
        options.out.write_text(table, encoding="utf-8")
    return 1 if any(outcome.lost for outcome in outcomes) else 0


def train(network: Network, folder: Path, run: str, fault: Fault | None, rng: random.Random) -> Outcome:
    """Trains a run, hurts it once, submits it again for as long as it does not end well, and compares it."""
    head, said = network.hosts[0], folder / f"{run}.txt"
    step = rng.choice(fault.steps) if fault is not None else 0
    training, text, submissions, began = start_training(head, folder, run, STEPS), "", 1, time.monotonic()
    if fault is not None:
        wait_for(lambda: find_step(folder / run) >= step, training, said)
        host = rng.choice([host for host in network.hosts[1:] if host.find("ray::RayTrainWorker")] or [head])
        began = time.monotonic()
        fault.inflict(network, host, rng)
    while training.wait(timeout=10 * START_S) != 0 and submissions < 3:
        text, submissions = text + said.read_text(), submissions + 1
        training = start_training(head, folder, run, STEPS)
    seconds, text = time.monotonic() - began, text + said.read_text()
    line = next(
        (line for line in text.splitlines() if fault is not None and any(each in line for each in fault.said)), ""
    )
    if fault is not None and fault.ends_host:
        network.replace(network.hosts.index(host)).start_ray(head=head.address, num_cpus=2)
    lost = find_loss(folder, run, text)
    if fault is not None and not line:
        lost = lost or "nothing was said"
    return Outcome(fault.name if fault else "", step, seconds, submissions, line[-200:], lost)


def find_loss(folder: Path, run: str, text: str) -> str:
    """What a run lacks beside the quiet one."""
    try:
        check_rows(folder / run, STEPS)
    except (AssertionError, LayerplanError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:200]} {text[-300:]}"
    results = [json.loads((folder / name / "training.json").read_text()) for name in (run, "quiet")]
    weights = [
        (folder / name / result["hf_dir"] / "model.safetensors").read_bytes()
        for name, result in zip((run, "quiet"), results)
    ]
    return "" if weights[0] == weights[1] else "weights differ"


def render(outcomes: Sequence[Outcome], seed: int) -> str:
    """The table as Markdown."""
    head = "| fault | in step | s to the end | submissions | said | lost |\n|---|---|---|---|---|---|"
    return "\n".join([f"Seed {seed}, {len(outcomes)} faults.\n", head, *map(render_row, outcomes), ""])


def render_row(outcome: Outcome) -> str:
    """A row of it."""
    said = outcome.said.replace("|", "/")
    return (
        f"| {outcome.fault} | {outcome.step} | {outcome.seconds:.0f} | {outcome.submissions} | {said}"
        f" | {outcome.lost or 'nothing'} |"
    )


if __name__ == "__main__":
    sys.exit(main())
