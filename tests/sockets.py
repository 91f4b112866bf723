"""What a process and all it has started listen on, looked at again and again while they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

EVERY_S = 5.0


def list_listening(pid: int) -> set[tuple[str, str]]:
    """(process, address) of every socket that takes connections or datagrams, of a process and its descendants."""
    found = set()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                for item in each.net_connections(kind="inet"):
                    if item.status == psutil.CONN_LISTEN or (item.status == psutil.CONN_NONE and not item.raddr):
                        found.add((each.name(), item.laddr.ip.removeprefix("::ffff:")))
    return found


@contextmanager
def watch_listening(pid: int) -> Iterator[set[tuple[str, str]]]:
    """Collects what is listened on within the block."""
    found: set[tuple[str, str]] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(EVERY_S):
            found.update(list_listening(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def find_open(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Those that another machine could reach."""
    return {(name, address) for name, address in found if address not in ("127.0.0.1", "::1")}
