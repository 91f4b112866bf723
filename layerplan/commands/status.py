"""`layerplan status`: how a run is doing, from its folder alone; asks no cluster and no service."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", metavar="RUN_FOLDER", help="folder or address of a run, finished or not")
    parser.add_argument("--once", action="store_true", help="print one table and end, on a terminal too")


def execute(args: argparse.Namespace) -> None:
    """Shows the table; on a terminal it is redrawn while somebody runs the run.

    Raises:
        ConfigError: When the folder is not one of a run.
    """
    from layerplan.pipeline.status_table import show_status

    show_status(args.run, once=args.once)
