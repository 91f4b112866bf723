"""Ray workers forked from a process that has imported what they need, in place of a Python of their own each.

Stands where Ray has `setup_worker.py`: the raylet of a cluster that was started within `forked_workers` starts this file for
every worker. It hands the worker's arguments, environment and open files to a zygote, which forks; what runs then is Ray's
own `default_worker.py`. Workers of one environment share a zygote, made by the first of them; it serves every cluster of
the process that first asked for forked workers and of that process's children, and ends with it. A worker that asks for more
than variables (a container, another Python) is started as Ray starts it. Imports cost a worker 4 to 12 CPU seconds, and
training by two workers starts a dozen.
"""

from __future__ import annotations

import array
import atexit
import fcntl
import gc
import hashlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import psutil

PRELOADED = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "grpc",
    "fsspec",
    "pydantic",
)
"""Without Ray: what it reads from its variables when it is imported is another in every job."""
OWN = ("RAY_", "LAYERPLAN_", "GLOO_", "NCCL_", "VLLM_", "OMP_NUM_THREADS")
"""Beginnings of variables that none of these reads while it is imported: they ask for no zygote of their own. A number of
threads is read then, and set again in the fork."""
FOLDER = "LAYERPLAN_ZYGOTES"
"""Names the folder of their addresses, whose last part is the process that they end with."""
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context=", "--language="
_NUM_FILES = 3


@contextmanager
def forked_workers() -> Iterator[None]:
    """Clusters that are started within have their workers forked."""
    from ray._private import parameter

    from layerplan.ray_session import WORKER_VARIABLES
    from layerplan.telemetry import QUIET_VARIABLES

    share_zygotes()
    # what jobs give their workers stands in the raylet's environment too, so that its idle workers need no other zygote
    added = {name: value for name, value in (WORKER_VARIABLES | QUIET_VARIABLES).items() if name not in os.environ}
    os.environ.update(added)
    plain = parameter.RayParams.__init__

    def start_here(self: object, *args: object, **options: object) -> None:
        plain(self, *args, **{"setup_worker_path": __file__, **options})  # type: ignore[misc, arg-type]

    parameter.RayParams.__init__ = start_here  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        parameter.RayParams.__init__ = plain  # type: ignore[method-assign]
        for name in added:
            os.environ.pop(name, None)


def share_zygotes() -> None:
    """From here on this process and its children use the same zygotes; those of a parent where it has some."""
    if FOLDER not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="lpz", dir="/tmp")) / str(os.getpid())
        folder.mkdir()
        os.environ[FOLDER] = str(folder)
        atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)


def list_forked() -> list[psutil.Process]:
    """The workers that the zygotes of this process have forked, and what those have started."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[-1].startswith(os.environ.get(FOLDER, "/none/") + "/"):
            with suppress(psutil.NoSuchProcess):
                found += process.children(recursive=True)
    return found


def main() -> None:
    """Starts one worker, as the raylet's command line says."""
    asked = [part for part in sys.argv[1:] if part.startswith((_CONTEXT, _LANGUAGE))]
    context = json.loads(next((part[len(_CONTEXT) :] for part in asked if part.startswith(_CONTEXT)), "") or "{}")
    plain = context.get("py_executable", sys.executable) == sys.executable and not context.get("command_prefix")
    if not plain or context.get("override_worker_entrypoint") or _LANGUAGE + "PYTHON" not in asked:
        from ray._private.workers import setup_worker

        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *sys.argv[1:]])
    os.environ.update(context.get("env_vars", {}))
    worker = [part for part in sys.argv[1:] if part not in asked]
    with _connect(Path(os.environ[FOLDER])) as zygote:
        message = json.dumps({"argv": worker, "environ": dict(os.environ), "cwd": str(Path.cwd())}).encode()
        files = array.array("i", range(_NUM_FILES))
        zygote.sendmsg([len(message).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        zygote.sendall(message)
        zygote.recv(1)  # nothing comes: the zygote has what was sent and closes


def _connect(folder: Path) -> socket.socket:
    """To the zygote of this environment, which is made where there is none."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    address = folder / f"zygote_{hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]}"
    with Path(f"{address}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.execv(sys.executable, [sys.executable, __file__, "--serve", str(address)])
                os._exit(0)
            while not address.exists():
                time.sleep(0.02)
    zygote = socket.socket(socket.AF_UNIX)
    zygote.connect(str(address))
    return zygote


def serve(address: Path) -> None:
    """Imports, then forks a worker for everyone who connects, until the process that all is for has ended."""
    for name in PRELOADED:
        __import__(name)
    assert "ray" not in sys.modules
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    listener.settimeout(1)
    Path(f"{address}.new").rename(address)
    owner = Path("/proc") / address.parent.name
    while owner.exists():
        with suppress(TimeoutError):
            _fork(listener, listener.accept()[0])


def _fork(listener: socket.socket, asking: socket.socket) -> None:
    asking.settimeout(None)
    size, ancillary, _, _ = asking.recvmsg(4, socket.CMSG_SPACE(_NUM_FILES * 4))
    files = array.array("i", ancillary[0][2])
    with asking.makefile("rb") as reader:
        asked = json.loads(reader.read(int.from_bytes(size, "big")))
    forked = os.fork()
    asking.close()
    if forked == 0:
        listener.close()
        _become_worker(asked, list(files))
    for file in files:
        os.close(file)


def _become_worker(asked: dict[str, Any], files: list[int]) -> NoReturn:
    """Runs Ray's worker to its end, in a process group of its own: Ray ends a worker's group with it."""
    import random

    import numpy as np
    import torch

    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(asked["environ"])
    os.chdir(asked["cwd"])
    sys.argv = asked["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    random.seed()
    np.random.seed()
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[2])) if sys.argv[1:2] == ["--serve"] else main()
