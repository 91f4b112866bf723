"""Proofs over ledgers.

Proves that the run read every row of its token store exactly once per epoch, with no gap; with several runs, that each
of their steps trained on the same rows as the first run's. A ledger is written with `train.write_ledger=true`.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerplan.corpus.manifest import Manifest, resolve_store
from layerplan.pipeline.run_folder import fetch_run
from layerplan.run_folder import LEDGER_NAME, MANIFEST_NAME, STORE_NAME, RunFolder
from layerplan.train.ledger_check import check_epochs, check_equal, load_ledger


def check_ledgers(paths: Sequence[str], *, store: str | None = None) -> None:
    """Prints what was proved.

    Args:
        paths: Run folders, ledger files, or addresses of runs.
        store: Folder or address of the token store, when it is not the first run's own.

    Raises:
        CorpusError: Naming the first step that breaks a proof.
    """
    runs = [fetch_run(run, LEDGER_NAME, f"{STORE_NAME}/{MANIFEST_NAME}") for run in paths]
    first = load_ledger(runs[0])
    for run in runs[1:]:
        num_steps = check_equal(first, load_ledger(run))
        print(f"{run}: the same rows as {runs[0]} in each of {num_steps:,} steps")
    where = resolve_store(store) if store else RunFolder(runs[0]).token_store
    for proof in check_epochs(first, Manifest.load(where)):
        print(
            f"{proof.source}: {proof.num_rows:,} rows, each exactly once in each of {proof.full_epochs:,} epochs;"
            f" {proof.rows_in_open_epoch:,} rows of the next epoch, each once"
        )
