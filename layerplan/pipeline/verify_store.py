"""Whether a token store is what was written: reads every file and lists every damaged row group."""

from __future__ import annotations

import logging

from layerplan.corpus.damage import advise_rebuild
from layerplan.corpus.manifest import Manifest, resolve_store
from layerplan.corpus.verify import verify_store
from layerplan.errors import CorpusError
from layerplan.storage.address import hide_keys

logger = logging.getLogger(__name__)


def verify(folder: str) -> None:
    """Prints what is damaged.

    Args:
        folder: Folder or address of a token store.

    Raises:
        CorpusError: When anything is.
    """
    store = resolve_store(folder)
    manifest = Manifest.load(store)
    if manifest.mode != "store":
        raise CorpusError(f"{hide_keys(store)}: holds no rows to verify; they are made while training")
    damage = verify_store(store, manifest, report=logger.info)
    for line in damage:
        print(line)
    if damage:
        raise CorpusError(f"{hide_keys(store)}: {len(damage):,} faults; {advise_rebuild(store)}")
    rows = manifest.num_rows + manifest.num_validation_rows
    compared = "are those that were written" if manifest.is_hashed else "can be read; this store has no hash for each"
    print(f"{hide_keys(store)}: {len(manifest.files):,} files, {rows:,} rows {compared}")
