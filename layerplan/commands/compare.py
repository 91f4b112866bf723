"""`layerplan compare`: verdicts over finished runs."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="finished run folders")
    parser.add_argument("--out", help="file for the verdicts as JSON")
    parser.add_argument("--table", help="file for the scores in the paper's layout; .tex gives LaTeX, else Markdown")
    parser.add_argument("--pool-seeds", action="store_true", help="runs that differ in the seed alone are one arm")


def execute(args: argparse.Namespace) -> None:
    """Prints the verdicts, and writes what was asked for."""
    from layerplan.pipeline.compare import compare

    compare(args.runs, out=args.out, table=args.table, pool_seeds=args.pool_seeds)
