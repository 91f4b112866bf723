"""Proofs over ledgers: `python jobs/check_ledger.py RUN_FOLDER [RUN_FOLDER ...] [--store STORE]`.

Proves that the run read every row of its token store exactly once per epoch, with no gap; with several runs, that each
of their steps trained on the same rows as the first run's. A ledger is written with `train.write_ledger=true`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.entry import run_guarded
from jobs.run_folder import RunFolder
from layerplan.corpus.manifest import Manifest, resolve_store
from layerplan.train.ledger_check import check_epochs, check_equal, load_ledger


def check_ledgers(args: argparse.Namespace) -> None:
    """Prints what was proved.

    Raises:
        CorpusError: Naming the first step that breaks a proof.
    """
    runs = [Path(run) for run in args.runs]
    first = load_ledger(runs[0])
    for run in runs[1:]:
        num_steps = check_equal(first, load_ledger(run))
        print(f"{run}: the same rows as {runs[0]} in each of {num_steps:,} steps")
    store = resolve_store(args.store) if args.store else RunFolder(runs[0]).token_store
    for proof in check_epochs(first, Manifest.load(store)):
        print(
            f"{proof.source}: {proof.num_rows:,} rows, each exactly once in each of {proof.full_epochs:,} epochs;"
            f" {proof.rows_in_open_epoch:,} rows of the next epoch, each once"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prove what runs trained on from their ledgers.")
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="run folders, or ledger files")
    parser.add_argument("--store", help="token store, when it is not the run's own")
    sys.exit(run_guarded(lambda: check_ledgers(parser.parse_args())))
