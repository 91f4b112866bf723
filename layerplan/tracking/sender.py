"""The process beside a run that carries its outbox to the store: `python -m layerplan.tracking.sender`.

A process of its own: its patience with the store is set by variables that only it has, the engine it imports costs the run
nothing, and a call that hangs can be left. It gets its address on standard input, where no list of processes shows it, and
ends when that input says so or closes, because the run is over or was killed. It answers in lines of JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from layerplan.errors import first_line
from layerplan.redaction import redact_text
from layerplan.tracking.backoff import Backoff
from layerplan.tracking.outbox import TrackingFolder
from layerplan.tracking.position import count_backlog
from layerplan.tracking.probe import probe

CALL_VARIABLES = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
}
"""How long one call may take, in seconds, and that the client itself tries once; what the user's environment sets wins."""
POLL_S, POLL_AT_END_S = 1.0, 0.1
LONGEST_WAIT_S, LONGEST_WAIT_AT_END_S = 60.0, 0.5
ORPHAN_S = 30.0
"""How long a sender goes on whose run was killed."""
MAX_REASON_CHARS = 300
NOT_LET_IN = "error code 401"
WHO_ASKS = (
    "user or password refused: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the"
    " environment of the job"
)

Kind = Literal["reached", "up", "down", "progress", "busy", "end"]


class Sender:
    """Carries until told to close, waiting longer and longer while the store fails."""

    def __init__(self, settings: dict[str, str], tell: Callable[[Kind, str], None]) -> None:
        self._uri = settings["uri"]
        self._experiment = settings["experiment"]
        self._folder = TrackingFolder(Path(settings["run_dir"]))
        self._tell = tell
        self._carrier: Any = None
        self._backoff = Backoff()
        self._is_idle = False
        self._closing = threading.Event()

    def close(self) -> None:
        """Lets `run` return as soon as nothing is left."""
        self._closing.set()

    def run(self) -> None:
        """Carries in rounds."""
        while True:
            moved = self._carry() if self._open() else 0
            if self._closing.is_set():
                if self._is_idle and count_backlog(self._folder.run_dir).is_empty:
                    return
                time.sleep(0.0 if moved else POLL_AT_END_S)
            else:
                self._closing.wait(0.0 if moved else POLL_S)

    @property
    def _longest_wait_s(self) -> float:
        return LONGEST_WAIT_AT_END_S if self._closing.is_set() else LONGEST_WAIT_S

    def _open(self) -> bool:
        """Opens the store unless that was done or failed a moment ago."""
        if self._carrier is not None:
            return True
        if self._backoff.left_s(self._longest_wait_s):
            return False
        reason = probe(self._uri)
        if reason is None:
            self._tell("reached", "")
            try:
                self._carrier = self._make_carrier()
                return True
            except Exception as error:
                reason = self._describe(error)
        self._backoff.fail()
        self._tell("down", reason)
        return False

    def _make_carrier(self) -> Any:
        from layerplan.tracking.carrier import Carrier
        from layerplan.tracking.mlflow_store import MlflowStore

        store = MlflowStore(self._uri, self._experiment, self._folder)
        store.open()
        return Carrier(self._folder, store, lambda: self._tell("progress", ""))

    def _carry(self) -> int:
        """One round; returns how many lines were sent."""
        carried = self._carrier.carry(self._longest_wait_s)
        if carried.failures:
            self._tell("down", self._describe(carried.failures[0]))
        elif not carried.waiting:
            self._tell("up", "")
        self._is_idle = not (carried.lines or carried.failures or carried.waiting)
        return int(carried.lines)

    def _describe(self, error: Exception) -> str:
        reason = first_line(error)
        return probe(self._uri) or (
            WHO_ASKS if NOT_LET_IN in reason else redact_text(reason, self._uri)[:MAX_REASON_CHARS]
        )


def main() -> None:
    """Reads the settings, sends until told to stop."""
    messages = _take_stdout()
    # the run decides when it ends; Ctrl-C and `ray job stop` tell all its processes
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    for name, value in CALL_VARIABLES.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(OSError):
        os.nice(5)
    tell = _make_tell(messages)
    with _only_sender(TrackingFolder(Path(settings["run_dir"])), tell):
        sender = Sender(settings, tell)
        threading.Thread(target=_watch_stdin, args=(sender,), daemon=True).start()
        sender.run()
    tell("end", "")
    os._exit(0)  # a pool of the client's may wait for a connection that hangs


def _take_stdout() -> IO[str]:
    """Standard output for our lines alone: the client prints addresses there."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    return messages


def _make_tell(messages: IO[str]) -> Callable[[Kind, str], None]:
    def tell(kind: Kind, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens once the run was killed
            messages.write(json.dumps({"kind": kind, "text": text}) + "\n")
            messages.flush()

    return tell


def _watch_stdin(sender: Sender) -> None:
    told = sys.stdin.readline()
    sender.close()
    if not told:
        time.sleep(ORPHAN_S)
        os._exit(1)
    sys.stdin.read()
    os._exit(1)


@contextlib.contextmanager
def _only_sender(folder: TrackingFolder, tell: Callable[[Kind, str], None]) -> Iterator[None]:
    """Waits until no other process sends for this folder; two would double what they send."""
    with folder.lock.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                tell("busy", "")
                time.sleep(POLL_S)
            except OSError:
                break  # a file system without locks
        yield


if __name__ == "__main__":
    main()
