"""The stall watchdog: a thread of the driver that reads the beats of the workers, and acts when training stands still.

It writes the stacks of all ranks into the run folder, names the slowest rank in one line, and ends that worker; Ray Train then
starts the group again from the newest checkpoint, as often as `train.max_failures` allows. A process that was stopped from
outside cannot write its stacks: then its node is asked what has become of it. No fault of the watchdog's own ends a run.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from layerplan.run_folder import STALLS_NAME, name_step
from layerplan.storage.mirror import fetch_file
from layerplan.train.heartbeat import BEAT_EVERY_S, Board, name_stacks
from layerplan.train.place import Beat
from layerplan.train.stall import (
    Pause,
    Pulse,
    Stall,
    find_limit,
    find_pause,
    find_slowdown,
    find_slowest,
    find_stall,
    update_pulses,
)

logger = logging.getLogger(__name__)

GONE = "gone"
_ANSWER_TIMEOUT_S = 15.0
_LOOK_TIMEOUT_S = 60.0
"""Of a task on a node where something is wrong: its process has to start there."""
_OPTIONS = {"num_cpus": 0, "max_restarts": -1}


@dataclass
class Recovery:
    """Measures how long training took to go on after an attempt was lost."""

    _pid: int | None = None
    """Of rank 0 in the newest attempt."""
    _lost_at: float | None = None
    _last_seen: float = 0.0

    def observe(self, pulses: Mapping[int, Pulse], now: float) -> str:
        """Returns the line to say once the first step of a new attempt is done, or nothing."""
        pulse = pulses.get(0)
        if pulse is None:
            return ""
        if self._pid not in (None, pulse.beat.pid):
            self._lost_at = self._last_seen
        self._pid = pulse.beat.pid
        if pulse.silent_s == 0:
            self._last_seen = now
        if self._lost_at is None or pulse.beat.place.is_first:
            return ""
        took, self._lost_at = now - self._lost_at, None
        return (
            f"training goes on at step {pulse.beat.place.step}, {took:.0f} s after a worker was lost,"
            f" {pulse.beat.start_s:.0f} s of which its process took to start"
        )


@dataclass
class Watchdog:
    """What the thread keeps from look to look."""

    board: Any
    run_dir: Path
    timeout_s: float | None
    say: Callable[[str], None]
    pulses: dict[int, Pulse] = field(default_factory=dict)
    recovery: Recovery = field(default_factory=Recovery)
    _ended: set[tuple[str, int]] = field(default_factory=set)
    """(node, pid) of the workers of attempts that are over: Ray Train starts all again, and what they said last is no news."""
    _noted_s: float = 0.0
    _slow_for: int | None = None
    """Pid of the first rank, of whose slower steps it was told."""
    _paused: Pause | None = None
    """What is said of once it is over."""

    def look(self, elapsed_s: float, now: float) -> None:
        """One look at the beats, `elapsed_s` after the last."""
        beats: dict[int, Beat] = ray.get(self.board.read.remote(), timeout=_ANSWER_TIMEOUT_S)
        beats = {rank: beat for rank, beat in beats.items() if (beat.node_id, beat.pid) not in self._ended}
        self.pulses = update_pulses(self.pulses, beats, elapsed_s)
        if line := self.recovery.observe(self.pulses, now):
            self.say(line)
        stall = find_stall(self.pulses, self.timeout_s)
        if stall is not None:
            self._paused = None
            self._act(stall)
        else:
            self._note_pause()
            self._note_slowdown()
            self._note()

    def _note_slowdown(self) -> None:
        """Says when steps have become slow, and when they no longer are: a link or a node may have."""
        slow = find_slowdown(self.pulses)
        if slow is not None and self._slow_for != slow.pid:
            self._slow_for = slow.pid
            self.say(
                f"steps take {slow.recent_s / slow.first_s:.1f} times as long as at first ({slow.recent_s:.2f} s, then"
                f" {slow.first_s:.2f} s) at step {slow.place.step}, all ranks alike: a slower link or node, or other work on"
                " one; perf/slowest_rank and perf/*_share in metrics.jsonl say who comes last and where the time goes"
            )
        elif slow is None and 0 in self.pulses and self._slow_for == (beat := self.pulses[0].beat).pid:
            self._slow_for = None
            self.say(
                f"steps take {beat.recent_s:.2f} s again, {beat.first_s:.2f} s at first, at step {beat.place.step}"
            )

    def _note_pause(self) -> None:
        """Says, once it is over, when a step took much longer than the ones before, or a rank was not heard of for long."""
        pause, past = find_pause(self.pulses), self._paused
        if past is not None:
            if past.is_silent and pause is not None and not (pause.is_silent and pause.seconds > past.seconds):
                return  # whoever is heard of again is still where it was for a moment: that it was away says more
            is_over = pause is None or (pause.beat.pid != past.beat.pid and not past.is_silent)
            if is_over and any(pulse.beat.pid == past.beat.pid for pulse in self.pulses.values()):
                self.say(_describe_pause(past))
        self._paused = pause

    def _note(self) -> None:
        """Says when a part that may take its time takes long, at the limit and each time it has doubled."""
        still = min((pulse.still_s for pulse in self.pulses.values()), default=0.0)
        if still < self._noted_s:
            self._noted_s = 0.0
        if still > max(find_limit(self.pulses, self.timeout_s), 2 * self._noted_s):
            self._noted_s = still
            beat = find_slowest(self.pulses).beat
            self.say(f"{_name(beat)} is at: {beat.place}, for {still:.0f} s; it is alive")

    def _act(self, stall: Stall) -> None:
        beat = stall.beat
        state = look_at_process(beat) if stall.is_silent else ""
        self._ended |= {(pulse.beat.node_id, pulse.beat.pid) for pulse in self.pulses.values()}
        if state == GONE:  # Ray Train knows already, or its node is gone too
            return
        folder = self.run_dir / STALLS_NAME / f"{name_step(beat.place.step)}_{datetime.now():%Y%m%d_%H%M%S}"
        written = self._collect_stacks(folder, stall, state)
        why = f"its process is {state} and says nothing" if stall.is_silent else f"it is at: {beat.place}"
        self.say(
            f"no progress for {stall.for_s:.0f} s (limit {stall.limit_s:.0f} s): {_name(beat)} is the slowest, {why};"
            f" stacks of {written} of {len(self.pulses)} ranks are in {folder}; this worker is ended, and training starts"
            " again from the newest checkpoint if train.max_failures allows"
        )
        ray.kill(beat.actor)

    def _collect_stacks(self, folder: Path, stall: Stall, state: str) -> int:
        """Returns the number of ranks whose stacks were written."""
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [rank for rank, pulse in self.pulses.items() if pulse.silent_s < 3 * BEAT_EVERY_S]
        self.board.want_stacks.remote(str(folder))
        files = [name_stacks(folder, rank) for rank in wanted]
        deadline = time.monotonic() + 3 * BEAT_EVERY_S + 4
        while time.monotonic() < deadline and not all(map(_has_arrived, files)):
            time.sleep(0.2)
        self.board.want_stacks.remote("")
        written = sum(file.exists() for file in files)
        for rank, pulse in self.pulses.items():
            if not name_stacks(folder, rank).exists():
                found = state if rank == stall.beat.rank else look_at_process(pulse.beat)
                text = f"{_name(pulse.beat)} did not answer: its process is {found}; last seen at: {pulse.beat.place}\n"
                name_stacks(folder, rank).write_text(text, encoding="utf-8")
        return written


def _has_arrived(file: Path) -> bool:
    """Whether a worker has written its stacks, here or, on another node, where the run is kept."""
    if not file.exists():
        fetch_file(file)
    return file.exists() and file.stat().st_size > 0


def look_at_process(beat: Beat) -> str:
    """Asks the worker's node what its process does: `stopped`, `sleeping`, ..., or `gone`."""
    if beat.host == socket.gethostname() and beat.node_id == ray.get_runtime_context().get_node_id():
        return _read_status(beat.pid)
    place = NodeAffinitySchedulingStrategy(node_id=beat.node_id, soft=False)
    asking = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(_read_status)
    try:
        return str(ray.get(asking.remote(beat.pid), timeout=_LOOK_TIMEOUT_S))
    except ray.exceptions.GetTimeoutError:
        return "on a node that does not answer"
    except ray.exceptions.RayError:
        return GONE


def _read_status(pid: int) -> str:
    import psutil

    try:
        status = str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return GONE
    return GONE if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else status


def _describe_pause(pause: Pause) -> str:
    who, seconds = _name(pause.beat), f"{pause.seconds:.0f} s"
    if pause.is_silent:
        return (
            f"nothing was heard of {who} for {seconds}, last at: {pause.beat.place}; it is back, and training goes on: its"
            " host, its process or the network between was away"
        )
    return f"training stood still for {seconds} and goes on; {who} was behind, at: {pause.beat.place}"


def _name(beat: Beat) -> str:
    return f"rank {beat.rank} (pid {beat.pid} on {beat.host})"


@contextmanager
def watching_stalls(run_dir: Path, timeout_s: float | None) -> Iterator[Any]:
    """Watches the workers that beat on the board it yields; a limit of 0 watches nothing and yields None."""
    if timeout_s == 0:
        yield None
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # beside who reads it: on the host of a worker it would be out of sight when that host is
    board = ray.remote(Board).options(**_OPTIONS, scheduling_strategy=here).remote()
    dog = Watchdog(board, run_dir, timeout_s, say=logger.info)
    stopped = threading.Event()
    threading.Thread(target=_watch, args=(dog, stopped), name="layerplan-watchdog", daemon=True).start()
    try:
        yield board
    finally:
        stopped.set()
        with suppress(ray.exceptions.RayError):  # the cluster may be gone, and the board with it
            ray.kill(board)


def _watch(dog: Watchdog, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT_EVERY_S):
        try:
            # a driver that was itself stopped, or starved, must not count that time against the workers
            dog.look(BEAT_EVERY_S, time.monotonic())
        except Exception:  # Ray is busy or going down: the next look tells
            continue
