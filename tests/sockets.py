"""What a process and all it has started listen on, looked at again and again while they run."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

EVERY_S = 5.0
YOUNG_S = 20.0
"""Processes open what they listen on while they start; older ones are looked at again now and then."""
EVERYONE_EVERY = 6


def list_listening(pid: int, max_age_s: float = float("inf")) -> set[tuple[str, str]]:
    """(process, address) of every socket that takes connections or datagrams, of a process and its descendants.

    Those older than `max_age_s` are left out.
    """
    found = set()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                if time.time() - each.create_time() > max_age_s:
                    continue
                for item in each.net_connections(kind="inet"):
                    if item.status == psutil.CONN_LISTEN or (item.status == psutil.CONN_NONE and not item.raddr):
                        found.add((each.name(), item.laddr.ip.removeprefix("::ffff:")))
    return found


@contextmanager
def watch_listening(pid: int) -> Iterator[set[tuple[str, str]]]:
    """Collects what is listened on within the block."""
    found: set[tuple[str, str]] = set()
    ended = threading.Event()

    def watch() -> None:
        for look in itertools.count():
            if ended.wait(EVERY_S):
                return
            found.update(list_listening(pid, YOUNG_S if look % EVERYONE_EVERY else float("inf")))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def find_open(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that another machine could reach."""
    return {(name, address) for name, address in found if address not in ("127.0.0.1", "::1")}
