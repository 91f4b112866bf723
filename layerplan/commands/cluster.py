"""`layerplan cluster check`: whether the nodes of a cluster are fit for a run; `queue`: which runs share it. Places nothing."""

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
    queue = actions.add_parser("queue", help="runs that use the cluster or wait for it, in order, and what each holds")
    for action in (check, queue):
        action.add_argument(
            "--address", metavar="HOST:PORT", help="the cluster; RAY_ADDRESS when left out, else this machine"
        )
    check.add_argument("--storage", metavar="PATH", help="folder or address that runs will be stored at")
    check.add_argument("--min-nodes", type=int, default=1, metavar="N", help="fail with fewer nodes (default 1)")
    check.add_argument("--out", type=Path, metavar="FILE", help="write what was measured as JSON")


def execute(args: argparse.Namespace) -> None:
    """Checks the cluster, or looks who uses it, and prints the table.

    Raises:
        ConfigError: When the number of nodes is none, or no cluster is named whose runs could be shown.
        ClusterError: When no cluster can be reached, or a check failed.
    """
    if args.action == "queue":
        from layerplan.pipeline.cluster_queue import print_queue

        print_queue(args.address)
        return
    from layerplan.pipeline.check_cluster import check_and_print

    check_and_print(args.address, args.storage, args.min_nodes, args.out)
