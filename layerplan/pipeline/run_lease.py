"""One writer per run folder: a lease that says who runs it, renewed for as long as it runs.

A submission looks who is there, puts a file of its own beside, and looks again: of two that come at once each that looked
last has seen the other's file, withdraws and tries once more. That needs nothing of the storage but that a file which was
written is listed from then on, which object stores hold as well as disks: no locks, no links, no conditional writes.

A holder on this machine is there as long as its process is. Of one on another machine only its sign of life is known: when
that stands still for `STALE_S` by the clock of who looks, the run is taken over, and a holder that finds its file gone stops.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import psutil

from layerplan.config.base import StrictModel
from layerplan.errors import ConfigError, RunBusyError
from layerplan.pipeline.lease_files import LeaseFiles
from layerplan.storage.paths import StoredPath

logger = logging.getLogger(__name__)

BEAT_S = 5.0
"""Between two signs of life."""
STALE_S = 45.0
"""Without one, after which a holder on another machine counts as gone."""
_ATTEMPTS = 20
_START_TOLERANCE_S = 1.0
"""A clock that is set moves what the system says of a process's start."""


class Holder(StrictModel):
    """Who holds a run."""

    owner: str
    """Random; names the file."""
    host: str
    machine: str
    """Boot and process namespace: within one of these a process number means one process."""
    pid: int
    process_started: float
    """Seconds since the epoch; tells a process from a later one of the same number."""
    job: str
    """Ray's id of the submission; empty without one."""
    started: str
    beat: str
    """Time of the last sign of life, by the holder's clock."""
    waits_for: str = ""
    """What it waits for, such as its place in a cluster's line; not written while it waits for nothing."""

    def describe(self) -> str:
        """One phrase for a message."""
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.started}, last heard of at {self.beat}"


class Lease:
    """A run that this process holds."""

    def __init__(self, holder: Holder) -> None:
        self.owner = holder.owner
        self._holder, self._waits_for = holder, ""

    def tell(self, waits_for: str) -> None:
        """Lets the next sign of life say what the run waits for; nothing once it goes on."""
        self._waits_for = waits_for

    def renew(self) -> str:
        """What a sign of life of this moment writes."""
        now = self._holder.model_copy(update={"beat": _now(), "waits_for": self._waits_for})
        return now.model_dump_json(exclude_defaults=True)  # who knows no such field reads a run that waits for nothing


@contextmanager
def hold_run(
    root: StoredPath | str,
    name: str,
    *,
    beat_s: float = BEAT_S,
    stale_s: float = STALE_S,
    report: Callable[[str], None] = logger.info,
) -> Iterator[Lease]:
    """Holds a run's folder; nobody else writes it within the block.

    Args:
        root: The run folder, local or at an address.
        name: The run's name, for messages.
        beat_s: Seconds between two signs of life.
        stale_s: Seconds without one after which a holder on another machine counts as gone.
        report: Takes a line when there is something to wait for.

    Raises:
        RunBusyError: When somebody holds it, or has taken it over meanwhile.
        ConfigError: When the folder cannot be written.
    """
    lease = Lease(_introduce_self())
    try:
        files = LeaseFiles(root)
        _claim(files, lease, name, stale_s, report)
    except OSError as error:
        raise ConfigError(f"storage_path: {root} cannot be written ({error})") from None
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(files, lease, beat_s, ended), daemon=True)
    try:
        with _interruptible():
            beating.start()
            try:
                yield lease
            finally:
                ended.set()
                beating.join()
    except _LeaseLost:
        raise RunBusyError(f"name: run {name!r}: {_describe_others(files, lease)}; this process stops") from None
    finally:
        with suppress(OSError):
            files.remove(lease.owner)


def _introduce_self() -> Holder:
    now = _now()
    return Holder(
        owner=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_identify_machine(),
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
        job=os.environ.get("RAY_JOB_ID", "") or os.environ.get("SLURM_JOB_ID", ""),
        started=now,
        beat=now,
    )


def _claim(files: LeaseFiles, lease: Lease, name: str, stale_s: float, report: Callable[[str], None]) -> None:
    for _ in range(_ATTEMPTS):
        for owner in files.list_owners():
            _clear(files, owner, name, stale_s, report)
        files.write(lease.owner, lease.renew())
        if files.list_owners() == [lease.owner]:
            return
        files.remove(lease.owner)
        time.sleep(random.uniform(0.1, 1.0))
    raise RunBusyError(f"name: run {name!r}: {_describe_others(files, lease)}; wait for it, or choose another name")


def _clear(files: LeaseFiles, owner: str, name: str, stale_s: float, report: Callable[[str], None]) -> None:
    """Removes what a holder left that is gone; raises `RunBusyError` when it is not."""
    text = files.read(owner)
    if text is None:
        return
    holder = _parse(files, owner, text)
    if holder.machine == _identify_machine():
        began = _read_start(holder.pid)
        is_there = began is not None and abs(began - holder.process_started) < _START_TOLERANCE_S
    else:
        report(f"[run] {name}: left or held by {holder.describe()}; waiting up to {stale_s:g} s for a sign of life")
        is_there = _shows_life(files, owner, text, stale_s)
    if is_there:
        raise RunBusyError(
            f"name: run {name!r} is being run by {holder.describe()}; wait until it has ended, or choose another name"
        )
    files.remove(owner)


def _parse(files: LeaseFiles, owner: str, text: str) -> Holder:
    try:
        return Holder.model_validate_json(text)
    except ValueError:
        raise RunBusyError(
            f"{files.locate(owner)}: cannot be read, so that nobody knows who runs this; remove it when nothing does"
        ) from None


def _shows_life(files: LeaseFiles, owner: str, text: str, stale_s: float) -> bool:
    """Whether the file changes before `stale_s` are over; one that is removed meanwhile belonged to a run that ended."""
    deadline = time.monotonic() + stale_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, stale_s / 10))
        now = files.read(owner)
        if now != text:
            return now is not None
    return False


class _LeaseLost(BaseException):
    """Raised in the main thread wherever it is; not for anybody in between to catch."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets a signal end the block. Not SIGINT: a shell that starts a job in the background has it ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGUSR2, _raise_lost)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, previous)


def _raise_lost(signum: int, frame: FrameType | None) -> None:
    raise _LeaseLost


def _beat(files: LeaseFiles, lease: Lease, beat_s: float, ended: threading.Event) -> None:
    while not ended.wait(beat_s):
        with suppress(OSError):  # a storage that does not answer now may answer the next time
            if files.read(lease.owner) is None:
                if signal.getsignal(signal.SIGUSR2) is _raise_lost:
                    os.kill(os.getpid(), signal.SIGUSR2)  # wakes the main thread from whatever it waits for
                return
            files.write(lease.owner, lease.renew())


def _describe_others(files: LeaseFiles, lease: Lease) -> str:
    texts = [files.read(owner) for owner in files.list_owners() if owner != lease.owner]
    holders = [Holder.model_validate_json(text).describe() for text in texts if text is not None]
    return f"is being run by {holders[0]}" if holders else "its lease was removed by another submission"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _identify_machine() -> str:
    """What tells machines, and containers with processes of their own, apart; a host's name does not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _read_start(pid: int) -> float | None:
    """When a process began; None when there is none, or only its exit status is left."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
