"""Waits until a cluster has its nodes: python cluster/await_nodes.py HOST:PORT NODES [SECONDS]."""

from __future__ import annotations

import sys
import time

EVERY_S = 0.5


def count_nodes() -> int:
    """Nodes that are alive."""
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def main(address: str, wanted: int, limit_s: float = 60) -> int:
    """Returns 0 once they are there, 1 after `limit_s` seconds without."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    deadline = time.monotonic() + limit_s
    while (found := count_nodes()) < wanted:
        if time.monotonic() > deadline:
            print(f"error: {found} of {wanted} nodes joined {address} within {limit_s:.0f} s", file=sys.stderr)
            return 1
        time.sleep(EVERY_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:])))
