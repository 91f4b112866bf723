"""`layerplan cluster check`: whether the nodes of a cluster are fit for a run; places nothing."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action and its arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="nodes, devices, versions, clocks, disks, shared storage, ports, bandwidth; a table and what to do",
    )
    check.add_argument(
        "--address", metavar="HOST:PORT", help="the cluster; RAY_ADDRESS when left out, else this machine"
    )
    check.add_argument("--storage", metavar="PATH", help="folder or address that runs will be stored at")
    check.add_argument("--min-nodes", type=int, default=1, metavar="N", help="fail with fewer nodes (default 1)")
    check.add_argument("--out", type=Path, metavar="FILE", help="write what was measured as JSON")


def execute(args: argparse.Namespace) -> None:
    """Checks the cluster and prints the table.

    Raises:
        ConfigError: When the number of nodes is none.
        ClusterError: When no cluster can be reached, or a check failed.
    """
    from layerplan.pipeline.check_cluster import check_and_print

    check_and_print(args.address, args.storage, args.min_nodes, args.out)
