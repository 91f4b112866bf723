"""The driver's end of the sending process: starts it, prints what it says of the store, and ends it in bounded time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import layerplan
from layerplan.config.tracking import TrackingConfig
from layerplan.errors import TrackingError
from layerplan.redaction import redact_text, redact_uri
from layerplan.run_folder import MLFLOW_STORE_NAME
from layerplan.tracking.outbox import PARENT, Outbox, OutboxTracker, TrackingFolder
from layerplan.tracking.position import count_backlog

FIRST_WORD_S = 4.0
"""A store that has not answered by then is said not to; a run starts without it."""
REQUIRED_S = 60.0
"""Patience at the start when the store is required: making a new database takes a while."""
DOWN_S, STALLED_S, CLOSE_S = 5.0, 60.0, 180.0
"""Patience at the end: with a store that fails, with one that says nothing, and in all."""
ADDRESS_VARIABLE = "MLFLOW_TRACKING_URI"
"""Where MLflow's own client would go; a run goes where its config says, on whatever machine it is continued."""
QUIET_S = 60.0
"""Between two lines about the store."""


def open_outbox(config: TrackingConfig, run_dir: Path, run_name: str, report: Callable[[str], None]) -> OutboxTracker:
    """Opens the run's outbox and starts what carries it.

    Raises:
        TrackingError: When the store is required and does not take the run.
    """
    folder = TrackingFolder(run_dir)
    outbox = Outbox(folder)
    store, unasked = locate_store(config, run_dir), os.environ.get(ADDRESS_VARIABLE)
    if unasked and config.uri is None:
        report(
            f"{ADDRESS_VARIABLE}={redact_uri(unasked)} is not asked, the lineage goes to {redact_uri(store)};"
            " set tracking.uri to the address for it"
        )
    sender = BackgroundSender(store, config.experiment, folder, report)
    tracker = OutboxTracker(outbox, PARENT, run_name, close=sender.close)
    sender.start(awaited=config.required)
    if config.required:
        sender.require()
    return tracker


def locate_store(config: TrackingConfig, run_dir: Path) -> str:
    """Address of the store, credentials included."""
    return config.uri or f"sqlite:///{run_dir.parent / MLFLOW_STORE_NAME}"


class BackgroundSender:
    """The sending process of one run folder."""

    def __init__(self, uri: str, experiment: str, folder: TrackingFolder, report: Callable[[str], None]) -> None:
        self._settings = {"uri": uri, "experiment": experiment, "run_dir": str(folder.run_dir.resolve())}
        self._folder = folder
        self._report = report
        self._process: subprocess.Popen[str] | None = None
        self._change = threading.Condition()
        self._state = "new"
        self._reason = ""
        self._said_at: float | None = None
        self._answered = False
        self._is_awaited = False
        self._said_down = False
        self._failures = 0
        self._closing = False
        self._progress_at = time.monotonic()

    def start(self, *, awaited: bool = False) -> None:
        """Starts the process; that it cannot be started is said and nothing more.

        Args:
            awaited: Whether `require` follows, which says itself what is wrong with the store.
        """
        self._is_awaited = awaited
        root = str(Path(layerplan.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "layerplan.tracking.sender"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
        except OSError as error:
            self._report(f"nothing is sent to the tracking store: its process cannot be started ({error})")
            return
        self._write(json.dumps(self._settings) + "\n")
        threading.Thread(target=self._listen, daemon=True).start()
        timer = threading.Timer(FIRST_WORD_S, self._say_when_silent)
        timer.daemon = True
        timer.start()

    def require(self) -> None:
        """Waits until the store has taken the run.

        Raises:
            TrackingError: When it does not.
        """
        with self._change:
            self._change.wait_for(lambda: self._state not in ("new", "busy", "reached"), REQUIRED_S)
            state, reason = self._state, self._reason
        if state == "up":
            self._is_awaited = False
            return
        self._closing = True
        self._kill()
        fault = reason or f"no answer within {REQUIRED_S:.0f} s"
        raise TrackingError(
            f"{self._name_store(fault)}; tracking.required=true asks for it; without that the run begins anyway"
        )

    def close(self, *, stalled_s: float = STALLED_S, in_all_s: float = CLOSE_S) -> None:
        """Waits while the store takes what is left, gives up soon when it fails, and says what has not arrived.

        Args:
            stalled_s: Patience with a store that neither takes anything nor fails.
            in_all_s: Patience in all.
        """
        self._closing = True
        if self._process is not None and self._process.poll() is None:
            self._progress_at = time.monotonic()
            self._write("close\n")
            self._wait_for_end(stalled_s, in_all_s)
            self._kill()
        self._say_what_is_left()

    def _wait_for_end(self, stalled_s: float, in_all_s: float) -> None:
        assert self._process is not None
        give_up = time.monotonic() + in_all_s
        while self._process.poll() is None:
            now = time.monotonic()
            patience = DOWN_S if self._state in ("down", "busy") else stalled_s
            if now > give_up or now - self._progress_at > patience:
                return
            with self._change:
                self._change.wait(0.05)

    def _say_what_is_left(self) -> None:
        backlog = count_backlog(self._folder.run_dir)
        if backlog.refused:
            self._report(
                f"{backlog.refused} values were refused by the store; {self._folder.refused} says which and why"
            )
        if not backlog.is_empty:
            why = f" ({self._reason})" if self._reason and self._state != "up" else ""
            self._report(
                f"not arrived at {redact_uri(self._settings['uri'])}{why}: {backlog.describe()}; everything is kept in"
                f" {self._folder.run_dir}, send it with: layerplan track sync {self._folder.run_dir}"
            )

    def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # it may be killed in the middle of a line
                message = json.loads(line)
                self._take(message["kind"], message["text"])
        if not self._closing:
            self._report(
                f"nothing is sent to the tracking store any more: its process ended; all is kept in {self._folder.run_dir}"
            )

    def _take(self, kind: str, text: str) -> None:
        with self._change:
            if kind == "progress":
                self._progress_at = time.monotonic()
            else:
                self._state = kind
            self._reason = text if kind == "down" else self._reason
            self._failures = self._failures + 1 if kind == "down" else 0 if kind == "up" else self._failures
            self._change.notify_all()
        if kind == "down" and not self._is_awaited:
            self._say_down()
        elif kind == "up":
            self._say_up()

    def _say_down(self) -> None:
        """At the first failure of a start, else at the second in a row: a lock that is let go at once is no news."""
        now = time.monotonic()
        if self._said_down or (self._answered and self._failures < 2):
            return
        if self._said_at is not None and now - self._said_at < QUIET_S:
            return
        self._said_down, self._said_at = True, now
        self._report(
            f"{self._name_store(self._reason)}; the run goes on, what it logs is kept in {self._folder.run_dir} and sent"
            " when the store answers"
        )

    def _say_up(self) -> None:
        self._answered = True
        if self._said_down:
            self._said_down = False
            self._report(f"{redact_uri(self._settings['uri'])} answers again; what was kept is being sent")

    def _say_when_silent(self) -> None:
        if self._state == "new" and not self._is_awaited and self._process is not None and self._process.poll() is None:
            self._take("down", f"no answer within {FIRST_WORD_S:.0f} s")

    def _name_store(self, reason: str) -> str:
        uri = self._settings["uri"]
        if reason.startswith("tracking."):
            return reason
        return f"tracking.uri={redact_uri(uri)}: does not take the run ({redact_text(reason, uri)})"

    def _write(self, text: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(text)
            self._process.stdin.flush()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
