"""`cluster/slurm/job.sbatch` under Debian's Slurm, whose two nodes are network namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debian_packages import NotAvailableError
from tests.network_hosts import Host, running_hosts, why_not
from tests.slurm import CPUS, start_slurm

ROOT = Path(__file__).resolve().parents[2]


class Slurm:
    """Two nodes, and who submits to them."""

    def __init__(self, hosts: list[Host], env: dict[str, str], folder: Path) -> None:
        self.hosts, self.env, self.folder = hosts, env, folder

    def submit(self, *words: str, where: Path = ROOT, **settings: str) -> tuple[int, str]:
        """Submits from the repository and waits; returns the exit status of the job and its output."""
        output = self.folder / "output.txt"
        output.unlink(missing_ok=True)
        env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root"), "OMP_NUM_THREADS": "1", **self.env}
        env |= {"RAY_TMPDIR": str(self.hosts[0].folder), "RAY_OPTIONS": "--object-store-memory 80000000"}
        env |= {"VENV": sys.prefix, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **settings}
        fewer = ("--gpus-per-node=0", f"--cpus-per-task={CPUS}", f"--output={output}", f"--chdir={where}", "--wait")
        command = self.hosts[0].enter(["sbatch", *fewer, str(ROOT / "cluster/slurm/job.sbatch"), *words])
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        assert "Submitted batch job" in done.stdout, done
        return done.returncode, output.read_text()

    def find_left(self) -> list[str]:
        """What a job left behind: Ray's processes, and its folder."""
        found = [f"{host.name}: {pid}" for host in self.hosts for pid in host.find("ray")]
        return found + [
            str(path) for host in self.hosts for top in host.disk.glob("lp-*") for path in (top, *top.rglob("*"))
        ]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of two nodes, each of which has four CPUs as far as Slurm knows."""
    if fault := why_not():
        (pytest.fail if os.environ.get("LAYERPLAN_HOSTS") == "required" else pytest.skip)(fault)
    folder = tmp_path_factory.mktemp("slurm")
    with running_hosts(2, folder) as network:
        try:
            env = start_slurm(network.hosts, folder)
        except NotAvailableError as error:
            pytest.skip(str(error))
        yield Slurm(network.hosts, env, folder)


def test_a_job_that_cannot_start_says_why_in_a_line(slurm: Slurm, tmp_path: Path) -> None:
    def refuse(*words: str, **settings: object) -> str:
        status, said = slurm.submit(*words, **settings)  # type: ignore[arg-type]
        assert status == 1 and said.count("\n") == 1, said
        return said.removeprefix("error: ").rstrip()

    assert refuse("jobs/cpt.py", where=tmp_path) == f"{tmp_path} is not the repository: submit from there"
    assert refuse("jobs/none.py") == f"jobs/none.py: no such file in {ROOT}"
    assert refuse("jobs/cpt.py", VENV="/nowhere").startswith("no /nowhere/bin/ray on host-1: the environment must lie")
    assert refuse("jobs/cpt.py", IFNAME="ib7") == "IFNAME=ib7: host-1 has no such interface with an IPv4 address"
    assert slurm.find_left() == []


@pytest.mark.long
def test_a_job_reaches_both_nodes_and_leaves_nothing(slurm: Slurm) -> None:
    """The job that is shortest and asks every node; `jobs/cpt.py` was run by hand (docs/scaling.md)."""
    status, said = slurm.submit("jobs/check_cluster.py", "--min-nodes", "2")
    assert status == 0, said[-5000:]
    assert all(host.address in said for host in slurm.hosts) and "all-reduce" in said
    assert "RAY_AUTH_TOKEN" not in said
    deadline = time.monotonic() + 30  # Slurm ends what is left of a step after it has said that it ended
    while (left := slurm.find_left()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []
