"""Which rank a training waits for, and when that is long enough to act."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerplan.train import heartbeat
from layerplan.train.heartbeat import dump_stacks
from layerplan.train.place import IN_STEP, Beat, Place
from layerplan.train.stall import Pulse, find_stall, update_pulses
from layerplan.train.watchdog import Recovery, Watchdog

ROWS, FORWARD, UPDATE = IN_STEP


def beat(rank: int, step: int, part: str, *, count: int = 1, slowest_s: float = 1.0, is_first: bool = False) -> Beat:
    return Beat(rank, 100 + rank, "host", "node", None, count, Place(step, part, is_first), slowest_s, 3.0)


def watch(*looks: list[Beat], every_s: float = 60.0, timeout_s: float | None = None) -> list[int | None]:
    """The rank that is named after each look."""
    pulses: dict[int, Pulse] = {}
    named: list[int | None] = []
    for beats in looks:
        pulses = update_pulses(pulses, {each.rank: each for each in beats}, every_s)
        stall = find_stall(pulses, timeout_s)
        named.append(None if stall is None else stall.beat.rank)
    return named


def stay(*beats: Beat, looks: int = 4) -> list[list[Beat]]:
    """The same places, look after look, by processes that go on beating."""
    return [[replace(each, count=each.count + look) for each in beats] for look in range(looks)]


def test_the_rank_that_waits_for_its_rows_is_named_and_not_those_that_wait_for_it() -> None:
    assert watch(*stay(beat(0, 7, FORWARD), beat(1, 7, ROWS), beat(2, 7, FORWARD))) == [None, None, None, 1]


def test_of_ranks_at_one_place_the_one_that_came_last_is_named() -> None:
    first = [beat(0, 7, FORWARD), beat(1, 6, UPDATE)]
    assert watch(first, *stay(beat(0, 7, FORWARD, count=2), beat(1, 7, FORWARD, count=2)))[-1] == 1


def test_a_process_that_says_nothing_is_named_wherever_it_is() -> None:
    silent = beat(1, 0, "starting", is_first=True)
    looks = [[each, silent] for (each,) in stay(beat(0, 0, "starting", is_first=True))]
    assert watch(*looks) == [None, None, None, 1]


def test_a_process_that_falls_silent_within_a_step_is_named_whichever_rank_came_last() -> None:
    """Rank 0 stops a moment after it came; stillness is over the limit before its silence is."""
    waits = stay(beat(1, 7, FORWARD), looks=5)
    stops = [beat(0, 7, FORWARD, count=count) for count in (1, 2, 2, 2, 2)]
    assert watch(*([stopped, *each] for stopped, each in zip(stops, waits, strict=True)), every_s=50.0) == [
        None,
        None,
        None,
        0,
        0,
    ]


@pytest.mark.parametrize("part", ["starting", "validating", "saving", "logging", "rolling back"])
def test_ranks_that_wait_for_one_that_loads_validates_or_saves_are_no_alarm(part: str) -> None:
    assert watch(*stay(beat(0, 8, FORWARD), beat(1, 7, part), looks=9)) == [None] * 9


def test_the_first_step_of_an_attempt_may_compile_as_long_as_it_takes() -> None:
    assert watch(*stay(beat(0, 1, FORWARD, is_first=True), looks=9)) == [None] * 9


@pytest.mark.parametrize(
    ("slowest_s", "timeout_s", "looks_until"),
    [(1.0, None, 3), (24.0, None, 3), (60.0, None, 6), (60.0, 30.0, 1)],  # more than 120 s, 5 x 60 s, 30 s
)
def test_the_limit_is_five_times_the_slowest_step_and_two_minutes_at_least_or_the_configs(
    slowest_s: float, timeout_s: float | None, looks_until: int
) -> None:
    looks = stay(beat(0, 7, FORWARD), beat(1, 7, FORWARD, slowest_s=slowest_s), looks=9)
    assert [name is not None for name in watch(*looks, timeout_s=timeout_s)].index(True) == looks_until


def test_a_step_that_ends_and_a_worker_that_was_replaced_begin_anew() -> None:
    looks = stay(beat(0, 7, FORWARD), looks=3)
    moved = [[beat(0, 8, FORWARD, count=9)], [replace(beat(0, 8, FORWARD, count=1), pid=55)]]
    assert watch(*looks, *moved, *stay(replace(beat(0, 8, FORWARD, count=2), pid=55), looks=2)) == [None] * 7


def test_the_stacks_name_the_function_a_thread_is_in(tmp_path: Path) -> None:
    dump_stacks(tmp_path / "stalls", 3)
    assert "test_the_stacks_name_the_function_a_thread_is_in" in (tmp_path / "stalls" / "rank_3.txt").read_text()


def test_how_long_it_took_to_go_on_is_said_once_at_the_first_step_of_the_new_attempt() -> None:
    recovery, old, new = Recovery(), beat(0, 7, FORWARD), replace(beat(0, 6, "starting", is_first=True), pid=55)
    looks = [
        (Pulse(old), 10.0),
        (Pulse(old, silent_s=2.0), 12.0),
        (Pulse(new), 30.0),
        (Pulse(replace(new, place=Place(8, ROWS, is_first=False))), 41.0),
        (Pulse(replace(new, place=Place(9, ROWS, is_first=False))), 43.0),
    ]
    said = [recovery.observe({0: pulse}, now) for pulse, now in looks]
    assert said == [
        *("", "", ""),
        "training goes on at step 8, 31 s after a worker was lost, 3 s of which its process took to start",
        "",
    ]


def test_a_step_that_took_much_longer_is_told_once_it_is_over(tmp_path: Path) -> None:
    said: list[str] = []
    dog, counts = Watchdog(None, tmp_path, None, said.append), itertools.count()

    def look(*beats: Beat) -> None:
        beating = {each.rank: replace(each, count=next(counts)) for each in beats}
        dog.pulses = update_pulses(dog.pulses, beating, 6.0)
        dog._note_pause()

    for _ in range(4):  # the first shows where they are; then 6, 12 and 18 s without a change
        look(beat(0, 7, FORWARD), beat(1, 7, ROWS))
    assert said == []
    look(beat(0, 8, ROWS), beat(1, 7, FORWARD))
    assert said == [
        "training stood still for 18 s and goes on; rank 1 (pid 101 on host) was behind, at: waiting for rows, step 7"
    ]
    for _ in range(7):  # a step that is usually as long is none
        look(beat(0, 9, FORWARD, slowest_s=20.0), beat(1, 9, ROWS, slowest_s=20.0))
    look(beat(0, 10, FORWARD), beat(1, 10, ROWS))
    for _ in range(4):  # and one that saves takes what that takes
        look(beat(0, 10, "saving"), beat(1, 11, ROWS))
    look(beat(0, 11, ROWS), beat(1, 11, ROWS))
    assert len(said) == 1
    for _ in range(4):  # unless it is known that it took much less before
        look(*(replace(beat(rank, 11, "validating"), before_s=1.0) for rank in range(2)))
    look(beat(0, 12, ROWS), beat(1, 12, ROWS))
    assert said.pop().startswith("training stood still for 18 s and goes on; rank 0 (pid 100 on host) was behind")
    for _ in range(4):  # a rank that was last heard of beside its log line is away all the same
        look(beat(0, 11, "logging"), beat(1, 12, FORWARD))
    look(beat(0, 12, FORWARD), beat(1, 12, FORWARD))
    assert len(said) == 2


@pytest.mark.parametrize(
    ("part", "is_first"), [("saving", False), ("validating", False), (FORWARD, True), (FORWARD, False)]
)
def test_a_rank_that_was_not_heard_of_is_told_of_wherever_it_was(tmp_path: Path, part: str, is_first: bool) -> None:
    """In a first save and a first step too, of which nobody knows how long they take; once, when it is back."""
    said: list[str] = []
    dog, count = Watchdog(None, tmp_path, None, said.append), itertools.count(1)

    def look(step: int, part: str, *, heard: bool, is_first: bool = False) -> None:
        last = 1 if not heard else next(count)
        beats = {
            rank: beat(rank, step, part, count=last if rank else next(count), is_first=is_first) for rank in range(2)
        }
        dog.pulses = update_pulses(dog.pulses, beats, 2.0)
        dog._note_pause()

    look(7, part, heard=False, is_first=is_first)
    for _ in range(9):
        look(7, part, heard=False, is_first=is_first)
    assert said == []
    look(7, part, heard=True, is_first=is_first)  # its beats come again before it has moved on
    look(8, ROWS, heard=True)
    assert said == [
        f"nothing was heard of rank 1 (pid 101 on host) for 18 s, last at: {part}, step 7; it is back, and training goes on:"
        " its host, its process or the network between was away"
    ]
    for _ in range(4):  # 8 s without a beat are none
        look(9, part, heard=False)
    look(9, part, heard=True)
    assert len(said) == 1


def test_a_rank_that_never_comes_back_is_not_said_to_be_back(tmp_path: Path) -> None:
    said: list[str] = []
    dog = Watchdog(None, tmp_path, None, said.append)
    for count in range(9):
        dog.pulses = update_pulses(
            dog.pulses, {rank: beat(rank, 7, FORWARD, count=count * (1 - rank)) for rank in (0, 1)}, 2.0
        )
        dog._note_pause()
    fresh = {rank: replace(beat(rank, 6, "starting", is_first=True), pid=200 + rank) for rank in (0, 1)}
    dog.pulses = update_pulses(dog.pulses, fresh, 2.0)
    dog._note_pause()
    assert said == []


def test_steps_that_became_slow_are_told_once_and_their_end_too(tmp_path: Path) -> None:
    said: list[str] = []
    dog = Watchdog(None, tmp_path, None, said.append)

    def look(first_s: float, recent_s: float) -> None:
        beats = {rank: replace(beat(rank, 40, FORWARD), first_s=first_s, recent_s=recent_s) for rank in range(2)}
        dog.pulses = update_pulses(dog.pulses, beats, 2.0)
        dog._note_slowdown()

    for first_s, recent_s in (
        (0.0, 9.0),
        (0.5, 1.4),
        (0.01, 0.09),
    ):  # too few yet, not so slow, a matter of milliseconds
        look(first_s, recent_s)
    assert said == []
    for _ in range(3):
        look(0.5, 3.0)
    assert len(said) == 1 and said[0].startswith(
        "steps take 6.0 times as long as at first (3.00 s, then 0.50 s) at step 40"
    )
    look(0.5, 0.6)
    assert said[1:] == ["steps take 0.60 s again, 0.50 s at first, at step 40"]


def test_a_heart_knows_its_first_steps_its_newest_and_how_long_a_part_took_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(heartbeat.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        heartbeat.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=str, current_actor=None)
    )
    monkeypatch.setattr(heartbeat.ray.util, "get_current_placement_group", lambda: None)
    heart = heartbeat.Heart(None, 0)

    def take(step: int, seconds: float) -> None:
        heart.mark(ROWS, step)
        clock[0] += seconds
        heart.mark("logging", step)

    take(1, 30.0)
    for step in range(2, 22):
        take(step, 2.0)
        heart.mark("saving", step)
        clock[0] += 4.0
    assert (heart._make_beat().first_s, heart._make_beat().before_s) == (2.0, 4.0)
    for step in range(22, 30):
        take(step, 7.0)
    made = heart._make_beat()
    assert (made.first_s, made.recent_s, made.slowest_s) == (2.0, 7.0, 30.0)
