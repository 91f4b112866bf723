"""A token store of prompts with a label: one row per prompt, its label the last token that is not padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerplan.corpus.build import write_manifest
from layerplan.corpus.label_order import LabelOrder
from layerplan.corpus.manifest import LabelFacts, Manifest, Shard, SourceRows
from layerplan.corpus.pack import RawRow
from layerplan.corpus.rows import PackedRows
from layerplan.corpus.store import StoreReader, write_rows
from layerplan.run_folder import SHARD_PREFIX, VALIDATION_NAME

ROWS_PER_GROUP = 512


def write_label_store(
    store: Path,
    train: Sequence[Sequence[int]],
    validation: Sequence[Sequence[int]],
    facts: LabelFacts,
    *,
    vocab_size: int,
    padding_id: int,
    tokenizer_sha256: str,
    counts: dict[str, int],
) -> Manifest:
    """Writes the rows and, last, the manifest.

    Args:
        store: Folder; made when it is not there.
        train: Token ids of each training row, the label last.
        validation: The same of rows that are held out.
        facts: What the rows are, with a start layer for each training row.
        vocab_size: One more than the highest id.
        padding_id: What stands behind the end of a row; never looked at.
        tokenizer_sha256: Hash of the tokenizer that made the ids.
        counts: Of prompts; `in` is the sum of the rest.
    """
    store.mkdir(parents=True, exist_ok=True)
    seq_len = max(map(len, (*train, *validation)))
    shard = _write(store / f"{SHARD_PREFIX}000000.parquet", train, seq_len, padding_id, first_row_id=0)
    held_out = None
    if validation:
        held_out = _write(store / VALIDATION_NAME, validation, seq_len, padding_id, first_row_id=-len(validation))
    sizes: dict[str, Any] = {
        "num_rows": len(train),
        "num_tokens": shard.num_tokens,
        "num_padding_tokens": len(train) * seq_len - shard.num_tokens,
        "num_validation_rows": len(validation),
    }
    source = SourceRows(
        path=facts.task, weight=None, num_validation_tokens=sum(map(len, validation)), counts=counts, **sizes
    )
    manifest = Manifest(
        **sizes,
        seq_len=seq_len,
        rows_per_group=ROWS_PER_GROUP,
        vocab_size=vocab_size,
        end_of_text_id=padding_id,
        tokenizer_sha256=tokenizer_sha256,
        config_sha256=facts.task_sha256,
        counts=counts,
        sources=[source],
        shards=[shard],
        validation=held_out,
        labels=facts,
    )
    write_manifest(store, manifest)
    return manifest


def make_label_order(manifest: Manifest, *, batch_size: int, seed: int) -> LabelOrder:
    """The order of a run over a store of prompts with a label."""
    assert manifest.labels is not None
    is_shallow_first = manifest.labels.order == "shallow_first"
    return LabelOrder(tuple(manifest.labels.start_layers), batch_size, seed, is_shallow_first)


def iter_label_steps(
    store: Path | str, order: LabelOrder, steps: range, *, rank: int, world_size: int, num_ids: int | None = None
) -> Iterator[PackedRows]:
    """Yields this rank's rows of each step; a store of prompts is small, and is read whole."""
    reader = StoreReader(store, num_ids=num_ids)
    everything = reader.read_rows(np.arange(reader.manifest.num_rows, dtype=np.int64))
    for step in steps:
        share = order.rank_rows_at(step, rank, world_size)
        yield order.fill(share, everything.select(np.maximum(share, 0)))


def _write(path: Path, rows: Sequence[Sequence[int]], seq_len: int, padding_id: int, *, first_row_id: int) -> Shard:
    raw = [
        RawRow(
            np.pad(np.asarray(ids, dtype=np.int32), (0, seq_len - len(ids)), constant_values=padding_id),
            np.zeros(1, dtype=np.int32),
            len(ids),
        )
        for ids in rows
    ]
    return write_rows(path, raw, first_row_id=first_row_id, rows_per_group=ROWS_PER_GROUP)
