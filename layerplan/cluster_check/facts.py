"""What a node tells of itself: plain values, taken without torch, that travel to whoever judges them."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path

OWN_PACKAGES = ("layerplan", "eval")
"""Packages whose source travels with a job, and is hashed file by file."""


@dataclass(frozen=True)
class NodeFacts:
    """One node."""

    label: str
    """Address that Ray knows it by, and what tells it from others of the same address."""
    host: str
    cpus: int
    memory: int
    """Bytes in all."""
    available: int
    """Bytes that are free, or would be at once."""
    devices: tuple[tuple[str, int], ...]
    """Name and bytes of every GPU."""
    free: dict[str, int]
    """Folder to bytes free on its disk."""
    versions: dict[str, str]
    """Package to version, Python and Ray's among them."""
    hashes: dict[str, str]
    """Package to a hash of what its installation lists, or of its source."""


def read_facts(label: str) -> NodeFacts:
    """Reads this machine; takes a second or two, most of it for the packages' lists of files."""
    import psutil

    memory = psutil.virtual_memory()
    folders = {name: Path(name) for name in (tempfile.gettempdir(), "/dev/shm") if Path(name).is_dir()}
    packages = {
        each.metadata["Name"].lower().replace("_", "-"): each for each in distributions() if each.metadata["Name"]
    }
    return NodeFacts(
        label=label,
        host=socket.gethostname(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory.total,
        available=memory.available,
        devices=list_devices(),
        free={name: shutil.disk_usage(folder).free for name, folder in folders.items()},
        versions={"python": platform.python_version(), **{name: each.version for name, each in packages.items()}},
        hashes={name: hash_installation(each) for name, each in packages.items()}
        | {name: hash_source(name) for name in OWN_PACKAGES},
    )


def list_devices() -> tuple[tuple[str, int], ...]:
    """Name and bytes of every GPU that `nvidia-smi` lists; none where there is no such program."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_devices(found)


def parse_devices(text: str) -> tuple[tuple[str, int], ...]:
    """Lines of a name, a comma and mebibytes."""
    pairs = (line.rpartition(",") for line in text.splitlines() if "," in line)
    return tuple((name.strip(), int(size.strip()) * 2**20) for name, _, size in pairs if size.strip().isdigit())


def hash_installation(package: Distribution) -> str:
    """Hash of a package's own list of its files with their hashes; of its name and version where it has none."""
    listed = package.read_text("RECORD")
    lines = sorted(line for line in (listed or "").splitlines() if "sha256=" in line and "__pycache__" not in line)
    kept = [line for line in lines if ".dist-info/" not in line] or [package.metadata["Name"], package.version]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def hash_source(name: str) -> str:
    """Hash of a package's Python files, by their names and bytes."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return "not found"
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
