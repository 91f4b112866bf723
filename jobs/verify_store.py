"""Whether a token store is what was written: `python jobs/verify_store.py STORE`.

Reads every file, lists every damaged row group and exits with 1 when there is one.
"""

from __future__ import annotations

import argparse
import sys

from jobs.entry import run_guarded
from layerplan.corpus.damage import advise_rebuild
from layerplan.corpus.location import hide_keys
from layerplan.corpus.manifest import Manifest, resolve_store
from layerplan.corpus.verify import verify_store
from layerplan.errors import CorpusError


def verify(args: argparse.Namespace) -> None:
    """Prints what is damaged.

    Raises:
        CorpusError: When anything is.
    """
    store = resolve_store(args.store)
    manifest = Manifest.load(store)
    if manifest.mode != "store":
        raise CorpusError(f"{hide_keys(store)}: holds no rows to verify; they are made while training")
    damage = verify_store(store, manifest, report=lambda line: print(line, flush=True))
    for line in damage:
        print(line)
    if damage:
        raise CorpusError(f"{hide_keys(store)}: {len(damage):,} faults; {advise_rebuild(store)}")
    rows = manifest.num_rows + manifest.num_validation_rows
    compared = "are those that were written" if manifest.is_hashed else "can be read; this store has no hash for each"
    print(f"{hide_keys(store)}: {len(manifest.files):,} files, {rows:,} rows {compared}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare every file of a token store with what was written.")
    parser.add_argument("store", metavar="STORE", help="folder or address of a token store")
    sys.exit(run_guarded(lambda: verify(parser.parse_args())))
