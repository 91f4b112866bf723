"""A run that waits says for what, after 5 s and every minute, and who holds it."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

import pytest

from layerplan import waiting
from layerplan.waiting import Ask, Holding, LossLog, Snapshot, WaitLog, takes_connections, telling_slow_start

WORKERS = tuple(Ask(f"group/{number}", "worker", {"CPU": 1.5}, has_process=False) for number in range(2))
OTHER = Holding("02000000", "placement group", {"CPU": 3.0})
MINE = Holding("01000000", "SplitCoordinator", {"CPU": 0.5})
BUSY = Snapshot(WORKERS, (MINE, OTHER), {"CPU": 0.5}, {"CPU": 4.0}, {"02000000": "cpt.py, pid 7 on 10.0.0.1"})


def test_the_line_names_what_is_asked_what_is_free_and_who_holds_it_the_largest_first() -> None:
    log = WaitLog("01000000")
    assert [log.observe(BUSY, now) for now in (0.0, 3.0)] == ["", ""]
    assert log.observe(BUSY, 6.0) == (
        "6 s for 2 x worker of 1.5 CPU; free: 0.5 of 4 CPU; held: 3 CPU by job 02000000 (cpt.py, pid 7 on 10.0.0.1):"
        " placement group; 0.5 CPU by this run: SplitCoordinator"
    )


def test_memory_is_said_in_gib() -> None:
    need, there = 3 * 2.0**30, 5.5 * 2**30
    mine = Holding("01000000", "EngineActor", {"CPU": 1.0, "memory": need})
    asked = Ask("a", "EngineActor", {"CPU": 1.0, "memory": need})
    busy = Snapshot([asked], [mine], {"CPU": 3.0, "memory": there - need}, {"CPU": 4.0, "memory": there})
    log = WaitLog("01000000")
    assert log.observe(busy, 0.0) == ""
    assert log.observe(busy, 6.0) == (
        "6 s for EngineActor of 1 CPU + 3.0 GiB of memory; free: 3 of 4 CPU, 2.5 of 5.5 GiB of memory;"
        " held: 1 CPU + 3.0 GiB of memory by this run: EngineActor"
    )


def test_it_is_said_again_every_minute_and_the_end_once() -> None:
    log = WaitLog("01000000")
    said = {now: log.observe(BUSY, float(now)) for now in range(0, 141, 3)}
    assert [now for now, line in said.items() if line] == [6, 66, 126]
    assert log.observe(Snapshot(), 141.0) == "resources are there after 141 s"
    assert log.observe(Snapshot(), 144.0) == ""


@pytest.mark.parametrize(
    ("held", "first_line_s"),
    [(4.0, 6), (3.0, 30)],  # all is taken by what runs, or one CPU is not: a process to which it was given is starting
)
def test_an_actor_whose_process_starts_is_given_longer(held: float, first_line_s: int) -> None:
    snapshot = Snapshot([Ask("a", "TracerActor", {"CPU": 1.0})], [Holding("02", "x", {"CPU": held})], {}, {"CPU": 4.0})
    log = WaitLog("01")
    assert next(now for now in range(0, 60, 3) if log.observe(snapshot, float(now))) == first_line_s


def test_what_was_placed_meanwhile_and_what_waits_for_a_moment_is_not_a_wait() -> None:
    log = WaitLog("01000000")
    assert not any(
        log.observe(Snapshot([Ask(str(now // 4), "f", {"CPU": 9.0})]), float(now)) for now in range(0, 60, 2)
    )


def test_a_head_that_is_gone_is_told_once_and_when_it_is_back() -> None:
    log = LossLog("the head", 3)
    said = [log.observe(answers) for answers in (True, False, False, True, False, False, False, False, True, True)]
    assert [number for number, line in enumerate(said) if line] == [6, 8]
    assert said[6].startswith("the head does not answer any more; ") and "submit the same command again" in said[6]
    assert said[8] == "the head answers again"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", ""])
def test_who_listens_is_asked_by_a_connection(host: str, tmp_path: Path) -> None:
    families = {"": socket.AF_UNIX, "::1": socket.AF_INET6, "127.0.0.1": socket.AF_INET}
    with socket.socket(families[host]) as server:
        server.bind((host, 0) if host else str(tmp_path / "raylet"))
        server.listen()
        port = server.getsockname()[1] if host else 0
        address = {"": str(tmp_path / "raylet"), "::1": f"[::1]:{port}"}.get(host, f"{host}:{port}")
        assert takes_connections(address)
    assert not takes_connections(address)


def test_a_cluster_that_is_slow_to_start_is_told_of_and_one_that_is_quick_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray ends a driver whose head dies while it connects, and nothing can be said then."""
    caplog.set_level(logging.INFO, "layerplan")
    monkeypatch.setattr(waiting, "START_SAID_S", 0.05)
    with telling_slow_start("a local Ray cluster"):
        pass
    time.sleep(0.15)
    assert caplog.messages == []
    with telling_slow_start("a local Ray cluster"):
        time.sleep(0.15)
    assert caplog.messages == [
        "0 s for a local Ray cluster to start or answer; if this run ends now, submit the same command again:"
        " it continues from what is finished, or its newest checkpoint"
    ]
