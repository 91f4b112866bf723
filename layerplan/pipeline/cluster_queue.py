"""Who uses a cluster and who waits for it, as a table."""

from __future__ import annotations

import os
import time

from rich.console import Console

from layerplan.config.cluster import ClusterConfig
from layerplan.errors import ConfigError
from layerplan.ray_session import connect
from layerplan.sharing.books import read_holdings, read_turns, sum_by_job
from layerplan.sharing.describe import render_line

WIDTH = 140


def print_queue(address: str | None) -> None:
    """Prints the runs of layerplan on a cluster, and what other jobs hold there.

    Args:
        address: Of the cluster; None takes `RAY_ADDRESS`.

    Raises:
        ConfigError: When neither names one.
        ClusterError: When it cannot be reached.
    """
    if address is None and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("--address: which cluster? Give HOST:PORT, or set RAY_ADDRESS")
    connect(ClusterConfig(address=address), min_cpus=0)
    holdings, jobs = read_holdings()
    turns = read_turns()
    table, foreign = render_line(turns, sum_by_job(holdings), jobs, time.time())
    console = Console(width=WIDTH)
    if turns:
        console.print(table)
    else:
        print("no run of layerplan uses this cluster or waits for it")
    if foreign:
        print(foreign)
