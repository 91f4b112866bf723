"""`layerplan track sync`: what a run's tracking store has not got yet is sent."""

from __future__ import annotations

import argparse

from layerplan.pipeline.run_folder import open_named_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the action and its arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    sync = actions.add_parser("sync", help="send what did not arrive while the store was down")
    sync.add_argument("run", metavar="RUN", help="folder of a run, such as runs/quickstart, or its address")
    sync.add_argument("--uri", help="address of the store; the one of the run's config when left out")


def execute(args: argparse.Namespace) -> None:
    """Sends until everything has arrived."""
    from layerplan.pipeline.track_sync import sync

    folder = open_named_run(args.run)
    try:
        sync(folder.root, args.uri)
    finally:
        folder.carry()
