"""What a training worker says about itself while it trains: where it is, and, when asked, what each of its threads does.

A thread sends a beat every few seconds, whatever the training thread does; a worker whose beats end is stopped or gone. The
beats go to one small actor, the board, which the driver reads (`layerplan/train/watchdog.py`).
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import ray

from layerplan.storage.mirror import carry_file
from layerplan.train.place import IN_STEP, LOGGING, STARTING, Beat, Mark, Place

BEAT_EVERY_S = 2.0
RECENT_STEPS = 50
FIRST_STEPS = 20
NEWEST_STEPS = 8
_ANSWER_TIMEOUT_S = 10.0


class Board:
    """Keeps the newest beat of every rank; an actor. A beat says everything, so one that was restarted knows all again."""

    def __init__(self) -> None:
        self._beats: dict[int, Beat] = {}
        self._group = ""
        self._wanted = ""

    def beat(self, beat: Beat) -> str:
        """Takes a beat; returns the folder that stacks are wanted in, or nothing.

        An attempt may have fewer workers than the one before: with its first beat all of the older one are forgotten.
        """
        if beat.group != self._group:
            if any(beat.began < known.began for known in self._beats.values()):
                return self._wanted
            self._group, self._beats = beat.group, {}
        self._beats[beat.rank] = beat
        return self._wanted

    def leave(self, rank: int, pid: int) -> None:
        """Forgets a worker that ends by itself."""
        if rank in self._beats and self._beats[rank].pid == pid:
            del self._beats[rank]

    def read(self) -> dict[int, Beat]:
        """The newest beats by rank."""
        return self._beats

    def want_stacks(self, folder: str) -> None:
        """Asks every worker for its stacks."""
        self._wanted = folder


class Heart:
    """The place of this worker, and the thread that sends it."""

    def __init__(self, board: Any, rank: int) -> None:
        self._board = board
        self._rank = rank
        self._place = Place(0, STARTING)
        self._steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._first_s: list[float] = []
        self._longest_s: dict[str, float] = {}
        self._began = self._since_part = time.perf_counter()
        self._count = 0
        self._dumped = ""
        self._stopped = threading.Event()
        self._start_s = time.time() - psutil.Process().create_time()
        placed_in = ray.util.get_current_placement_group()
        self._group = "" if placed_in is None else placed_in.id.hex()
        self._since = time.time()

    def mark(self, part: str, step: int) -> None:
        """Notes what the training thread begins; costs well under a microsecond's worth of a step."""
        now = time.perf_counter()
        if part == IN_STEP[0]:
            self._began = now
        elif part == STARTING:
            self._steps_s.clear()  # a phase of the plan begins, and compiles anew
            self._first_s.clear()
        elif part == LOGGING:
            if self._steps_s and len(self._first_s) < FIRST_STEPS:
                self._first_s.append(now - self._began)
            self._steps_s.append(now - self._began)
        left = self._place.part
        if left not in IN_STEP:
            self._longest_s[left] = max(self._longest_s.get(left, 0.0), now - self._since_part)
        self._since_part = now
        self._place = Place(step, part, is_first=not self._steps_s)

    def start(self) -> None:
        """Starts to send."""
        threading.Thread(target=self._send_beats, name="layerplan-heart", daemon=True).start()

    def stop(self) -> None:
        """Ends the beats; the board forgets this worker."""
        self._stopped.set()
        with suppress(Exception):  # what the worker ended with must not be hidden by a cluster that goes down
            self._board.leave.remote(self._rank, os.getpid())

    def _send_beats(self) -> None:
        while not self._stopped.wait(BEAT_EVERY_S if self._count else 0):
            self._count += 1
            try:
                wanted = ray.get(self._board.beat.remote(self._make_beat()), timeout=_ANSWER_TIMEOUT_S)
                if wanted and wanted != self._dumped:
                    dump_stacks(Path(wanted), self._rank)
                    self._dumped = wanted
            except Exception:  # training must not end because nobody listens
                continue

    def _make_beat(self) -> Beat:
        context = ray.get_runtime_context()
        return Beat(
            self._rank,
            os.getpid(),
            socket.gethostname(),
            context.get_node_id(),
            context.current_actor,
            self._count,
            self._place,
            max(list(self._steps_s), default=0.0),
            self._start_s,
            self._group,
            before_s=self._longest_s.get(self._place.part, 0.0),
            first_s=median(self._first_s) if len(self._first_s) == FIRST_STEPS else 0.0,
            recent_s=median(list(self._steps_s)[-NEWEST_STEPS:]) if self._steps_s else 0.0,
            began=self._since,
        )


def dump_stacks(folder: Path, rank: int) -> None:
    """Writes what every thread of this process does into `rank_N.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    with name_stacks(folder, rank).open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    carry_file(name_stacks(folder, rank))


def name_stacks(folder: Path, rank: int) -> Path:
    """The file with the stacks of a rank."""
    return folder / f"rank_{rank}.txt"


@contextmanager
def beating(board: Any, rank: int) -> Iterator[Mark]:
    """Yields what marks the place of this worker; without a board, something that does nothing."""
    if board is None:
        yield lambda part, step: None
        return
    heart = Heart(board, rank)
    heart.start()
    try:
        yield heart.mark
    finally:
        heart.stop()
