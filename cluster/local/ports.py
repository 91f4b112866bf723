"""Ports of the local scripts: free ones, and a clear word when there is none.

python cluster/local/ports.py free 3                     prints three free ports; PORTS=20000-20100 limits the choice
python cluster/local/ports.py check RAY_PORT=6379        fails when the port is taken

On loopback; ADDRESS=10.0.0.1 names another address of this machine.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable

ADDRESS = os.environ.get("ADDRESS", "127.0.0.1")
LOWEST, HIGHEST = 1024, 65535


def find_free_ports(count: int, candidates: Iterable[int]) -> list[int]:
    """The first free ports among the candidates; 0 stands for any port the system gives. Fewer when there are fewer."""
    held: list[socket.socket] = []
    try:
        for port in candidates:
            if len(held) == count:
                break
            probe = socket.socket()
            if port:  # who listens there counts, not what a connection of a moment ago left
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ADDRESS, port))
            except OSError:
                probe.close()
                continue
            held.append(probe)
        return [int(probe.getsockname()[1]) for probe in held]
    finally:
        for probe in held:
            probe.close()


def parse_range(text: str) -> range:
    """`first-last` to a range.

    Raises:
        ValueError: When it is none.
    """
    first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and LOWEST <= int(first) <= int(last) <= HIGHEST):
        raise ValueError(f"PORTS={text}: must be first-last, between {LOWEST} and {HIGHEST}, for example 20000-20100")
    return range(int(first), int(last) + 1)


def print_free(count: int) -> None:
    """Prints as many free ports, one a line.

    Raises:
        ValueError: When there are not that many.
    """
    limits = os.environ.get("PORTS", "")
    ports = find_free_ports(count, parse_range(limits) if limits else [0] * count)
    if len(ports) < count:
        where = f" in PORTS={limits}" if limits else ""
        raise ValueError(f"no free port: {count} are needed on {ADDRESS}{where}, {len(ports)} are free")
    print("\n".join(map(str, ports)))


def check_free(setting: str) -> None:
    """Accepts `NAME=port` when the port is free.

    Raises:
        ValueError: When it is no port or taken.
    """
    name, _, text = setting.partition("=")
    if not (text.isdigit() and LOWEST <= int(text) <= HIGHEST):
        raise ValueError(f"{name}={text}: must be a port between {LOWEST} and {HIGHEST}")
    if not find_free_ports(1, [int(text)]):
        raise ValueError(f"{name}={text}: the port is taken on {ADDRESS}; set {name} to a free one")


def main(arguments: list[str]) -> int:
    """Runs one command; returns the exit status."""
    try:
        if arguments[0] == "free":
            print_free(int(arguments[1]))
        else:
            for setting in arguments[1:]:
                check_free(setting)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
