"""Which rank holds a training up, decided from the beats of all ranks and nothing else.

Time is counted by whoever watches, so that clocks of different nodes do not matter and a watcher that was itself stopped for a
while does not take that while for silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from layerplan.train.place import IN_STEP, LOGGING, Beat

SHORTEST_LIMIT_S = 120.0
SLOWEST_TIMES = 5.0
SHORTEST_PAUSE_S = 10.0
PAUSE_TIMES = 2.0
"""Of the slowest recent step, which may be the first: what is said of once it is over; below the limit nothing is done."""
SLOW_TIMES = 3.0
SHORTEST_SLOWDOWN_S = 0.1


@dataclass(frozen=True)
class Pulse:
    """A rank's newest beat, and for how long it has been the newest."""

    beat: Beat
    silent_s: float = 0.0
    """Since a beat came."""
    still_s: float = 0.0
    """Since its place changed."""


@dataclass(frozen=True)
class Stall:
    """A rank that the others wait for."""

    beat: Beat
    for_s: float
    limit_s: float
    is_silent: bool
    """Whether its process has stopped to say anything."""


def update_pulses(pulses: Mapping[int, Pulse], beats: Mapping[int, Beat], elapsed_s: float) -> dict[int, Pulse]:
    """What is known after `elapsed_s` more seconds; a rank without a beat is not known."""
    return {rank: _update(pulses.get(rank), beat, elapsed_s) for rank, beat in beats.items()}


def _update(pulse: Pulse | None, beat: Beat, elapsed_s: float) -> Pulse:
    if pulse is None or pulse.beat.pid != beat.pid:
        return Pulse(beat)
    silent = 0.0 if beat.count != pulse.beat.count else pulse.silent_s + elapsed_s
    still = 0.0 if beat.place != pulse.beat.place else pulse.still_s + elapsed_s
    return replace(pulse, beat=beat, silent_s=silent, still_s=still)


def find_limit(pulses: Mapping[int, Pulse], timeout_s: float | None) -> float:
    """Seconds that may pass: those of the config, else five times the slowest recent step, at least two minutes."""
    if timeout_s is not None:
        return timeout_s
    slowest = max((pulse.beat.slowest_s for pulse in pulses.values()), default=0.0)
    return max(SHORTEST_LIMIT_S, SLOWEST_TIMES * slowest)


@dataclass(frozen=True)
class Pause:
    """A time for which nothing went on, that may yet end by itself."""

    seconds: float
    beat: Beat
    """Of the rank that is behind, or that nothing is heard of."""
    is_silent: bool
    """Whether nothing is heard of it: its host, its process or the network between is away."""


def find_pause(pulses: Mapping[int, Pulse]) -> Pause | None:
    """The rank that nothing is heard of, or the one that is behind when all have been still for long beside what is usual there.

    A rank beats wherever it is, so that its silence says something in a first save or a compilation too, of which nobody
    knows how long they take.
    """
    if not pulses:
        return None
    silent = max(pulses.values(), key=lambda pulse: pulse.silent_s)
    if silent.silent_s >= SHORTEST_PAUSE_S:
        return Pause(silent.silent_s, silent.beat, is_silent=True)
    seconds = min(pulse.still_s for pulse in pulses.values())
    slowest = find_slowest(pulses)
    if slowest.beat.place.part in (*IN_STEP, LOGGING):
        usual = max(pulse.beat.slowest_s for pulse in pulses.values())
        is_known = any(pulse.beat.place.is_limited for pulse in pulses.values())
    else:  # whoever validates or saves takes what that takes, which is known from the second time on
        usual, is_known = slowest.beat.before_s, slowest.beat.before_s > 0
    is_long = seconds >= max(SHORTEST_PAUSE_S, PAUSE_TIMES * usual)
    return Pause(seconds, slowest.beat, is_silent=False) if is_known and is_long else None


def find_slowdown(pulses: Mapping[int, Pulse]) -> Beat | None:
    """The first rank's beat when steps take several times as long as the first ones did.

    All ranks take a step together, so that its length says nothing about which one is slow.
    """
    beat = pulses[0].beat if 0 in pulses else None
    if beat is None or not beat.first_s:
        return None
    is_long = beat.recent_s >= max(SLOW_TIMES * beat.first_s, beat.first_s + SHORTEST_SLOWDOWN_S)
    return beat if is_long else None


def find_slowest(pulses: Mapping[int, Pulse]) -> Pulse:
    """The rank that is behind; of several at one place the one that came there last, as the others wait for it."""
    return min(pulses.values(), key=lambda pulse: (pulse.beat.place.order, pulse.still_s))


def find_stall(pulses: Mapping[int, Pulse], timeout_s: float | None) -> Stall | None:
    """The rank that holds training up for longer than the limit, or None.

    A rank whose beats have ended is one wherever it is. A rank that beats is one in the middle of a step only, and only
    when it is the slowest: the ranks that wait for one that validates or saves are still for as long as that takes.
    """
    if not pulses:
        return None
    limit = find_limit(pulses, timeout_s)
    silent = max(pulses.values(), key=lambda pulse: pulse.silent_s)
    if silent.silent_s > limit:
        return Stall(silent.beat, silent.silent_s, limit, is_silent=True)
    slowest = find_slowest(pulses)
    waited = min(pulse.still_s for pulse in pulses.values())
    if waited > limit and slowest.beat.place.is_limited:
        if silent.silent_s > limit / 2:  # its process was stopped in the middle of the step; the others wait for it
            return Stall(silent.beat, silent.still_s, limit, is_silent=True)
        return Stall(slowest.beat, slowest.still_s, limit, is_silent=False)
    return None
