"""`cluster/ssh` over Debian's sshd: two machines that are network namespaces, started and stopped from a third."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.debian_packages import NotAvailableError
from tests.network_hosts import Host, running_hosts, why_not
from tests.planted import find_files_with
from tests.sshd import Keys, start_sshd

ROOT = Path(__file__).resolve().parents[2]
TOKEN = f"planted{secrets.token_hex(24)}"
BIND = "import socket, time; s = socket.create_server(('{}', {})); print('bound', flush=True); time.sleep(600)"


class Machines:
    """Two machines that a third one may enter."""

    def __init__(self, hosts: list[Host], keys: Keys) -> None:
        self.head, self.other, self.desk = hosts
        self.keys = keys
        self.names = f"{self.head.address} {self.other.address}"

    def launch(self, script: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Runs a launcher on the third one."""
        env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root"), "HOSTS": self.names}
        env |= {"SSH": self.keys.known, "VENV": sys.prefix, "RAY_TMPDIR": str(self.head.folder)}
        env |= {"RAY_AUTH_TOKEN": TOKEN, "RAY_OPTIONS": "--num-cpus 2 --object-store-memory 80000000"}
        command = self.desk.enter(["bash", str(ROOT / "cluster/ssh" / script)])
        return subprocess.run(command, env=env | settings, capture_output=True, text=True, timeout=300)

    def list_commands(self, host: Host) -> list[str]:
        """Command lines of what runs on a machine beside sshd and what keeps it."""
        found = []
        for pid in host.find():
            if pid == host.pid:
                continue
            said = ""
            with suppress(OSError):  # it may end while it is looked at
                said = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if said and not re.match(r"sleep 100000|sshd: /usr/sbin/sshd|nsenter ", said):
                found.append(said)
        return found


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """The machines, without Ray."""
    if fault := why_not():
        (pytest.fail if os.environ.get("LAYERPLAN_HOSTS") == "required" else pytest.skip)(fault)
    folder = tmp_path_factory.mktemp("ssh")
    with running_hosts(3, folder) as network:
        try:
            keys = start_sshd(network.hosts[:2], folder)
        except NotAvailableError as error:
            pytest.skip(str(error))
        yield Machines(network.hosts, keys)


def test_what_cannot_start_is_one_line_before_anything_is_started(machines: Machines, tmp_path: Path) -> None:
    head, other, desk = machines.head.address, machines.other.address, machines.desk.address

    def refuse(**settings: str) -> str:
        done = machines.launch("start.sh", **settings)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done
        # a connection's own process may outlive its end by a moment
        wait_until(lambda: machines.list_commands(machines.head) == machines.list_commands(machines.other) == [])
        return done.stderr.removeprefix("error: ").rstrip()

    assert refuse(HOSTS="").startswith("HOSTS is not set")
    assert refuse(RAY_AUTH_TOKEN="").startswith("RAY_AUTH_TOKEN is not set")
    assert refuse(HOSTS=f"{head} {head}") == f"HOSTS names {head} twice: one node a machine"
    assert re.fullmatch(f"{desk}: not reached by ssh: .*Connection refused", refuse(HOSTS=f"{head} {desk}"))
    assert re.fullmatch(f"{head}: not reached by ssh: .*Permission denied.*", refuse(SSH=machines.keys.unknown))
    assert refuse(VENV="/nowhere").startswith(f"{head}: no /nowhere/bin/ray: the environment must lie at the same path")
    assert refuse(IFNAME="eth7") == f"{head}: IFNAME=eth7: host-1 has no such interface with an IPv4 address"
    assert refuse(RAY_PORT="66000") == f"{head}: RAY_PORT=66000: must be a port between 1024 and 65535"

    taken = machines.head.start(sys.executable, "-c", BIND.format(head, 6379), output=tmp_path / "bound")
    wait_until(lambda: "bound" in (tmp_path / "bound").read_text())
    done = machines.launch("start.sh")
    (process,) = machines.head.find("socket.create_server")
    os.kill(process, 9)
    taken.wait()
    assert done.stderr == f"error: {head}: RAY_PORT=6379: the port is taken on {head}; set RAY_PORT to a free one\n"

    changed = tmp_path / "changed.py"
    changed.write_text((ROOT / "layerplan/errors.py").read_text() + "\n")
    machines.other.run("mount", "--bind", str(changed), str(ROOT / "layerplan/errors.py"))
    said = refuse()
    machines.other.run("umount", str(ROOT / "layerplan/errors.py"))
    assert re.fullmatch(f"{other}: layerplan's-source \\w+, but \\w+ on the head; all machines need the same", said)


@pytest.mark.long
def test_a_cluster_is_started_takes_a_job_through_a_tunnel_and_leaves_nothing(machines: Machines) -> None:
    started = machines.launch("start.sh", HF_TOKEN="planted-secret")
    try:
        assert started.returncode == 0 and "cluster of 2 machines" in started.stdout, started
        again = machines.launch("start.sh")
        assert again.returncode == 1 and "cluster/ssh/stop.sh first" in again.stderr
        for host in (machines.head, machines.other):
            assert not [each for each in machines.list_commands(host) if TOKEN in each]
        assert list_listening(machines.head)["8265"] == {"127.0.0.1"}, "the dashboard waits for a tunnel"
        check_job(machines)
        assert find_files_with(TOKEN, machines.head.disk, machines.other.disk) == []
    finally:
        stopped = machines.launch("stop.sh")
    assert stopped.returncode == 0 and stopped.stdout.count(": stopped") == 2, stopped
    wait_until(
        lambda: machines.list_commands(machines.head) == machines.list_commands(machines.other) == [], limit_s=20
    )
    assert machines.launch("stop.sh").stdout.count(": nothing was running") == 2


def check_job(machines: Machines) -> None:
    """Submits `jobs/check_cluster.py` as the launcher says, from a machine that is no node."""
    desk, address = machines.desk, "http://127.0.0.1:8265"
    tunnel = subprocess.Popen(
        desk.enter([*machines.keys.known.split(), "-N", "-L", "8265:127.0.0.1:8265", machines.head.address]),
        stdin=subprocess.DEVNULL,
    )
    try:
        env = desk.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
        job = ["env", f"PYTHONPATH={ROOT}", "python", "jobs/check_cluster.py", "--min-nodes", "2"]
        done = subprocess.run(
            desk.enter([*ray, "--working-dir", str(ROOT), "--", *job]),
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        for process in desk.find("8265:127.0.0.1:8265"):
            os.kill(process, 9)
        tunnel.wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for host in (machines.head, machines.other):
        assert host.address in done.stdout
    assert "all-reduce" in done.stdout and TOKEN not in done.stdout


def list_listening(host: Host) -> dict[str, set[str]]:
    """Port to the addresses at which a machine's processes take connections."""
    found: dict[str, set[str]] = {}
    for line in host.run("ss", "--tcp", "--listening", "--numeric", "--no-header").splitlines():
        address, _, port = line.split()[3].rpartition(":")
        found.setdefault(port, set()).add(address)
    return found


def wait_until(is_true: Callable[[], bool], limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
