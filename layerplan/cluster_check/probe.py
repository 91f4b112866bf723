"""What runs on each node while a cluster is checked: an actor that tells, writes, reads, listens, connects and sums."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from layerplan.cluster_check.facts import NodeFacts, read_facts
from layerplan.storage.paths import BucketPath, StoredPath, remove_tree, write_whole

TIMEOUT_S = 20
REDUCED_BYTES = 16 * 2**20
"""Of one all-reduce: a bucket of gradients, large enough that latency does not count."""
WRITTEN_BYTES = 64 * 2**20
MEASURED_S = 0.5
VISIBLE_S = 10.0
"""How long a file that is there may take to be seen from another node; NFS remembers for seconds that it was not."""


class NodeProbe:
    """The actor of one node."""

    def __init__(self, label: str, address: str, variables: Mapping[str, str]) -> None:
        """Takes over the variables training workers would have there."""
        self._label, self._address = label, address
        os.environ.update(variables)
        self._listener: socket.socket | None = None
        self._store: Any = None

    def tell(self) -> NodeFacts:
        """What the node has."""
        return read_facts(self._label)

    def read_clock(self) -> float:
        """Seconds since the epoch, here."""
        return time.time()

    def compute(self) -> float:
        """Best float32 rate of one core in a matrix product, FLOP/s."""
        import torch

        from layerplan.train.throughput import measure_matmul_flops

        torch.set_num_threads(1)
        return measure_matmul_flops(torch.device("cpu"), torch.float32, num_tries=5)

    def write(self, place: str, name: str) -> str:
        """Writes a file aside and renames it; returns why that failed, or nothing."""
        return write_file(open_place(place), name)

    def read(self, place: str, names: Sequence[str]) -> list[str]:
        """Files that are not there, or not whole, after a while."""
        return find_unseen(open_place(place), names)

    def time_write(self, place: str) -> float:
        """Bytes per second at which this node alone writes a file as checkpoints are written; 0 when it cannot."""
        return time_write(open_place(place))

    def clean(self, place: str) -> int | None:
        """Removes what was written; returns the bytes free on a folder's disk."""
        folder = open_place(place)
        remove_tree(folder)
        return shutil.disk_usage(folder.parent).free if isinstance(folder, Path) else None

    def listen(self) -> int:
        """Listens on a free port of the node's address."""
        self._listener = socket.create_server((self._address, 0))
        return int(self._listener.getsockname()[1])

    def connect(self, address: str, port: int) -> str:
        """Opens a connection; returns why that failed, or nothing."""
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def serve_store(self) -> int:
        """Begins a meeting point for an all-reduce on the node's address, and returns its port."""
        import torch.distributed as dist

        listener = socket.create_server((self._address, 0))
        port = int(listener.getsockname()[1])
        self._store = dist.TCPStore(
            self._address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return port

    def reduce(self, address: str, port: int, rank: int, size: int) -> float:
        """All-reduces with the other members over gloo; returns bytes per second that each of them sends.

        Raises:
            RuntimeError: When the members do not come together.
        """
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        timeout = timedelta(seconds=TIMEOUT_S)
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        group = dist.ProcessGroupGloo(store, rank, size, timeout)
        values = torch.ones(REDUCED_BYTES // 4)
        group.allreduce([values]).wait()
        repeats = torch.ones(1)
        started = time.perf_counter()
        group.allreduce([values]).wait()
        repeats *= max(1.0, min(20.0, MEASURED_S / max(time.perf_counter() - started, 1e-6)))
        group.broadcast([repeats]).wait()
        started = time.perf_counter()
        for _ in range(int(repeats)):
            group.allreduce([values]).wait()
        seconds = (time.perf_counter() - started) / int(repeats)
        return 2 * (size - 1) / size * REDUCED_BYTES / seconds


def open_place(place: str) -> StoredPath:
    """A folder, or an address in a bucket."""
    return BucketPath(place.rstrip("/")) if "://" in place else Path(place).expanduser()


def write_file(folder: StoredPath, name: str) -> str:
    """Writes the file's own name into it, aside and then renamed; returns why that failed, or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, name.encode())
    except Exception as error:  # a bucket's library raises what it likes
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return ""


def time_write(folder: StoredPath) -> float:
    """Bytes per second of one file of `WRITTEN_BYTES`, whole and on the disk itself; 0 when it cannot be written."""
    content = os.urandom(WRITTEN_BYTES)
    started = time.perf_counter()
    try:
        write_whole(folder / "written", content)
    except Exception:  # the trial before it says why; a bucket's library raises what it likes
        return 0.0
    return WRITTEN_BYTES / (time.perf_counter() - started)


def find_unseen(folder: StoredPath, names: Sequence[str], patience_s: float = VISIBLE_S) -> list[str]:
    """Those of the files that are not there, or do not hold their name, once patience ends."""
    deadline = time.monotonic() + patience_s
    while True:
        unseen = [name for name in names if not _holds_name(folder / name, name)]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.2)


def _holds_name(path: StoredPath, name: str) -> bool:
    try:
        return path.read_bytes() == name.encode()
    except Exception:  # not there, or not to be read
        return False
