"""Debian's sshd on hosts in network namespaces: keys of their own, and a client's configuration that knows them."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.debian_packages import SSHD, lay_over, unpack
from tests.network_hosts import Host

CONFIG = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
CLIENT = """Host *
  User root
  IdentityFile {key}
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
"""


@dataclass(frozen=True)
class Keys:
    """Commands of a client: one that the hosts let in, and one whose key they do not know."""

    known: str
    unknown: str


def start_sshd(hosts: list[Host], folder: Path) -> Keys:
    """Starts it on the hosts and waits until they let the client in; `folder` is one that all see.

    Raises:
        NotAvailableError: When there is no sshd to be had.
    """
    root = unpack(SSHD)
    known, _ = (_make_key(folder / name) for name in ("known", "unknown"))
    passwd = folder / "passwd"
    passwd.write_text(Path("/etc/passwd").read_text() + "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n")
    for host in hosts:
        own = folder / f"sshd-{host.name}"
        own.mkdir()
        with (folder / "known_hosts").open("a") as file:
            file.write(f"{host.address} {_make_key(own / 'host_key')}\n")
        (own / "authorized_keys").write_text(known + "\n")
        (own / "sshd_config").write_text(CONFIG.format(folder=own))
        lay_over(host, root)
        host.run("mount", "--bind", str(passwd), "/etc/passwd")
        host.run("sh", "-c", "mount -t tmpfs tmpfs /run && mkdir /run/sshd")
        host.start("/usr/sbin/sshd", "-D", "-e", "-f", str(own / "sshd_config"), output=own / "log")
    commands = []
    for name in ("known", "unknown"):
        config = folder / f"{name}.config"
        config.write_text(CLIENT.format(key=folder / name, folder=folder))
        commands.append(f"ssh -F {config}")
    _wait_for(hosts, commands[0])
    return Keys(*commands)


def _make_key(path: Path) -> str:
    """Makes a key pair; returns the public one."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return " ".join(path.with_name(f"{path.name}.pub").read_text().split()[:2])


def _wait_for(hosts: list[Host], ssh: str) -> None:
    deadline = time.monotonic() + 60
    for host in hosts:
        while True:
            command = host.enter([*ssh.split(), host.address, "true"])
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode == 0:
                break
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.2)
