"""Hosts on one machine: each a namespace of processes, network, mounts and name, with an address on a bridge of its own.

A host has its own loopback, its own `/dev/shm`, its own folder for temporary files and its own raylet. What is shared is
what `shared` names, as a network file system would be. Root is needed; a user without it may try
`unshare --user --map-root-user --net` where the system lets users make namespaces, which CI does not need.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.ray_script import script_environment

START_S = 180
"""For a raylet, on a machine with other work."""
PORT = 6379


def why_not() -> str:
    """Why hosts cannot be made here, in a line; empty where they can."""
    tools = [name for name in ("ip", "tc", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if tools:
        return f"hosts in network namespaces need {', '.join(tools)} (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "hosts in network namespaces need root: sudo -E python -m pytest tests/integration/test_hosts.py"
    probe = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "name", "lpprobe", "type", "bridge"], capture_output=True, text=True
    )
    return "" if probe.returncode == 0 else f"hosts in network namespaces are not allowed here: {probe.stderr.strip()}"


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    link: str
    """End of its cable at the bridge."""
    folder: Path
    """For its temporary files, on its own disk."""
    disk: Path
    """That disk, as this machine sees it."""
    init: subprocess.Popen[bytes]
    pid: int = 0
    """Of its first process, as this machine sees it."""
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def enter(self, command: Sequence[str]) -> list[str]:
        """The command as it is run inside."""
        return ["nsenter", "-t", str(self.pid), "-n", "-p", "-m", "-u", "--wd=/", *command]

    def run(self, *command: str, timeout_s: float = START_S, **env: str) -> str:
        """Runs a command to a good end; returns what it said."""
        done = subprocess.run(
            self.enter(command), env=self.environment(**env), capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def start(self, *command: str, output: Path, **env: str) -> subprocess.Popen[str]:
        """Starts a command inside."""
        with output.open("w") as file:
            process = subprocess.Popen(
                self.enter(command), env=self.environment(**env), stdout=file, stderr=subprocess.STDOUT, text=True
            )
        self.started.append(process)
        return process

    def environment(self, **extra: str) -> dict[str, str]:
        """Of its processes."""
        own = {"RAY_TMPDIR": str(self.folder), "TMPDIR": str(self.folder), "GLOO_SOCKET_IFNAME": "eth0"}
        # the memory they see is the machine's, and others use it too: no raylet is to end workers over that
        settings = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_memory_monitor_refresh_ms": "0"}
        return script_environment(**own) | settings | extra

    def start_ray(self, *, head: str | None, num_cpus: int) -> None:
        """Starts its raylet, as the head when none is named."""
        place = ["--head", f"--port={PORT}"] if head is None else [f"--address={head}:{PORT}"]
        dashboard = ["--include-dashboard=true", "--dashboard-host=127.0.0.1"] if head is None else []
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        sizes = [f"--num-cpus={num_cpus}", "--object-store-memory=80000000", "--disable-usage-stats"]
        self.run(*ray, *place, *dashboard, *sizes, f"--node-ip-address={self.address}")

    def find(self, *words: str) -> list[int]:
        """Processes of this host whose command line has all the words, as this machine numbers them."""
        namespace = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and (entry / "ns" / "pid").readlink() == namespace:
                    said = (entry / "cmdline").read_bytes().decode(errors="replace")
                    if all(word in said for word in words):
                        found.append(int(entry.name))
        return found

    def cut(self) -> None:
        """Pulls the cable."""
        _run("ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        """Plugs it in again."""
        _run("ip", "link", "set", self.link, "up")

    def limit(self, megabits_per_s: float) -> None:
        """Lets no more pass, in either direction."""
        shape = ["root", "tbf", "rate", f"{megabits_per_s}mbit", "burst", "128kb", "latency", "200ms"]
        _run("tc", "qdisc", "replace", "dev", self.link, *shape)
        self.run("tc", "qdisc", "replace", "dev", "eth0", *shape)

    def kill(self) -> None:
        """Ends all its processes at once, as when the power goes."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.init.wait()
        for process in self.started:
            process.wait()


@dataclass
class Network:
    """Hosts on one bridge."""

    folder: Path
    """Of what they share to make them."""
    bridge: str
    net: str
    hosts: list[Host] = field(default_factory=list)

    def add(self, index: int) -> Host:
        """Makes the host of a place; another one there must be gone."""
        # one path, since all nodes of a cluster have the head's, and a disk of its own there; Ray's sockets need short paths
        place, own = Path("/tmp") / f"lph{os.getpid()}", Path("/tmp") / f"lph{os.getpid()}-{index}"
        place.mkdir(exist_ok=True)
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        name, address = f"host-{index + 1}", f"{self.net}.{index + 1}"
        link, inside = (f"lp{end}{os.getpid()}-{index}"[:15] for end in "vc")
        table = self.folder / "hosts"
        mounts = f"mount --bind {own} {place} && mount --bind {table} /etc/hosts && mount -t tmpfs tmpfs /dev/shm"
        # the first process takes what was orphaned, as an init does: what nobody waits for would look alive
        shell = f"{mounts} && hostname {name} && while :; do sleep 100000 & wait; done"
        kinds = ("--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "--kill-child")
        init = subprocess.Popen(["unshare", *kinds, "sh", "-c", shell], stderr=subprocess.DEVNULL)
        host = Host(name, address, link, place, own, init, pid=_find_child(init.pid))
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", inside)
        _run("ip", "link", "set", link, "master", self.bridge, "up")
        _run("ip", "link", "set", inside, "netns", str(host.pid), "name", "eth0")
        for words in (
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "dev", "eth0"),
        ):
            host.run("ip", *words)
        # one that fills the link; what a machine has by default may probe for more instead
        host.run("sh", "-c", "echo cubic > /proc/sys/net/ipv4/tcp_congestion_control || true")
        return host

    def replace(self, index: int) -> Host:
        """Takes a host away, whatever is left of it, and puts a new one of the same address in its place."""
        self.remove(self.hosts[index])
        self.hosts[index] = self.add(index)
        return self.hosts[index]

    def remove(self, host: Host) -> None:
        """Takes a host away."""
        host.kill()
        subprocess.run(["ip", "link", "del", host.link], check=False, capture_output=True)
        shutil.rmtree(host.disk, ignore_errors=True)


@contextmanager
def running_hosts(count: int, folder: Path) -> Iterator[Network]:
    """Makes so many hosts that share `folder`, and takes them away at the end."""
    number = os.getpid() % 250
    network = Network(folder, f"lpb{os.getpid()}"[:15], f"10.231.{number}")
    lines = [f"{network.net}.{index + 1} host-{index + 1}" for index in range(count)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
    _run("ip", "link", "add", "name", network.bridge, "type", "bridge")
    try:
        _run("ip", "link", "set", network.bridge, "up")
        for index in range(count):
            network.hosts.append(network.add(index))
        yield network
    finally:
        for host in network.hosts:
            network.remove(host)
        subprocess.run(["ip", "link", "del", network.bridge], check=False)
        shutil.rmtree(Path("/tmp") / f"lph{os.getpid()}", ignore_errors=True)


def _find_child(pid: int) -> int:
    """The first process of the new namespaces, once it is there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in _list_children(pid):
            with suppress(OSError):  # a child may end while it is looked at
                if any(Path(f"/proc/{each}/comm").read_text() == "sleep\n" for each in _list_children(child)):
                    return child
        time.sleep(0.05)
    raise TimeoutError("the namespaces of a host were not made")


def _list_children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
