"""Debian's Slurm on hosts in network namespaces: a controller on the first, a daemon on each, and munge between them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.debian_packages import SLURM, lay_over, unpack
from tests.network_hosts import Host

CPUS = 4
CONFIG = """ClusterName=layerplan
SlurmctldHost={hosts[0].name}({hosts[0].address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=20
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def start_slurm(hosts: list[Host], folder: Path) -> dict[str, str]:
    """Starts it and waits until all nodes are idle; returns what its commands need in their environment.

    Raises:
        NotAvailableError: When there is no Slurm to be had.
    """
    root = unpack(SLURM)
    own = hosts[0].folder
    config, key = folder / "slurm.conf", folder / "munge.key"
    nodes = "\n".join(f"NodeName={host.name} NodeAddr={host.address} CPUs={CPUS}" for host in hosts)
    config.write_text(CONFIG.format(hosts=hosts, folder=own, nodes=nodes))
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    env = {"SLURM_CONF": str(config)}
    for host in hosts:
        lay_over(host, root)
        host.run("sh", "-c", f"cd {own} && mkdir munge controller spool && chmod 755 . munge")
        files = (f"--{name}-file={own}/munge/{name}" for name in ("log", "pid", "seed"))
        host.run("munged", "--force", f"--key-file={key}", f"--socket={own}/munge/socket", *files)
    hosts[0].start("slurmctld-wlm", "-D", output=folder / "slurmctld.txt", **env)
    for host in hosts:
        daemon = ("slurmd-wlm", "-D", "-d", "/usr/sbin/slurmstepd-wlm")
        host.start(*daemon, output=folder / f"slurmd-{host.name}.txt", **env)
    deadline = time.monotonic() + 60
    while (state := hosts[0].run("sinfo", "-h", "-o", "%t %D", **env).strip()) != f"idle {len(hosts)}":
        assert time.monotonic() < deadline, state + (folder / "slurmctld.txt").read_text()[-2000:]
        time.sleep(0.3)
    return env
