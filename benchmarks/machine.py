"""What a result was measured on. Nothing is imported but torch, and only to describe it: some benchmarks run on little more."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_commit() -> str:
    """Short hash of the tree, `-dirty` behind it when it has changes; empty outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def find_cpu() -> str:
    """The processor's name and what of vector instructions it offers."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())} ({', '.join(flags) or 'no AVX'})"


def find_versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def find_command() -> str:
    """The command line, with the folder of the data by its variable."""
    data = os.environ.get("LAYERPLAN_DATA") or "\0"
    return " ".join(["python", *sys.argv]).replace(data, "$LAYERPLAN_DATA")


def describe_torch(device: str) -> dict[str, str | int]:
    """What `describe_machine` says, and the GPU or the threads that torch computes on."""
    import torch

    on = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {"threads": torch.get_num_threads()}
    return {**describe_machine("torch", "transformers", "accelerate"), **on}


def describe_machine(*packages: str) -> dict[str, str | int]:
    """Date, commit, command, machine and versions."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": find_commit(),
        "command": find_command(),
        "cpu": find_cpu(),
        "cores": os.cpu_count() or 0,
        "python": platform.python_version(),
        **find_versions(*packages),
    }


def render_machine(*packages: str, command: str | None = None, **more: str) -> str:
    """The same in two lines of Markdown; `more` are versions found elsewhere."""
    values = {**describe_machine(*packages), **more}
    software = ", ".join(f"{name} {values[name]}" for name in ("python", *packages, *more) if name in values)
    return (
        f"{values['date']}, commit {values['commit']}; {values['cpu']}, {values['cores']} cores; {software}.\n\n"
        f"Command: `{command or values['command']}`"
    )
