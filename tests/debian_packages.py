"""Programs of Debian packages that are not installed: downloaded, unpacked into a folder, and laid over a host's `/usr`.

`LAYERPLAN_DEBS` names a folder of `.deb` files to use instead of a download, or one to keep them in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from tests.network_hosts import Host

DOWNLOAD_S = 90
SSHD = ("openssh-server", "libwrap0")
SLURM = (
    *("munge", "libmunge2", "libhwloc15", "libslurm38"),
    *("slurm-wlm-basic-plugins", "slurm-client", "slurmd", "slurmctld"),
)


class NotAvailableError(Exception):
    """Why there are no such packages here, in a line."""


def unpack(packages: tuple[str, ...]) -> Path:
    """The folder that the packages were unpacked into.

    Raises:
        NotAvailableError: When they cannot be had.
    """
    tools = [name for name in ("apt-get", "dpkg") if shutil.which(name) is None]
    if tools:
        raise NotAvailableError(f"{packages[0]} is unpacked from Debian's package, which needs {', '.join(tools)}")
    kept = Path(os.environ.get("LAYERPLAN_DEBS") or Path(tempfile.gettempdir()) / f"layerplan-debs-{os.getuid()}")
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    root = kept / "unpacked" / packages[0]
    with FileLock(kept / "lock"):
        if not root.exists():
            missing = [name for name in packages if not list(kept.glob(f"{name}_*.deb"))]
            if missing:
                _download(missing, kept)
            _unpack(packages, kept, root)
    return root


def _download(packages: list[str], folder: Path) -> None:
    command = ["apt-get", "-o", "Acquire::Retries=2", "-o", "APT::Sandbox::User=root", "download", *packages]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_S)
    except subprocess.TimeoutExpired:
        raise NotAvailableError(f"apt-get download {packages[0]}: no end within {DOWNLOAD_S} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise NotAvailableError(f"apt-get download {' '.join(packages)}: {said[-1]}")


def _unpack(packages: tuple[str, ...], folder: Path, root: Path) -> None:
    half = root.with_name(f"{root.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for name in packages:
        newest = max(folder.glob(f"{name}_*.deb"), key=lambda path: path.stat().st_mtime)
        subprocess.run(["dpkg", "-x", str(newest), str(half)], check=True)
    half.rename(root)


def lay_over(host: Host, root: Path) -> None:
    """Makes a host have what was unpacked; this machine does not."""
    host.run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={root / 'usr'}:/usr", "/usr")
