"""`layerplan ledger`: proofs of what runs trained on. A ledger is written with `train.write_ledger=true`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="run folders, or ledger files")
    parser.add_argument("--store", help="token store, when it is not the run's own")


def execute(args: argparse.Namespace) -> None:
    """Proves that every row was read once per epoch, and that all runs trained on the same rows."""
    from layerplan.pipeline.check_ledger import check_ledgers

    check_ledgers(args.runs, store=args.store)
