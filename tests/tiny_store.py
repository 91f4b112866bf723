"""A model and a token store that train in milliseconds, made without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def make_inputs(folder: Path, *, num_layers: int = 2) -> None:
    """Writes `folder/base`, a random model, and `folder/store`, 64 rows of 32 tokens in two documents each."""
    from tests.qwen3 import build_tiny_qwen3

    build_tiny_qwen3(vocab_size=128, num_hidden_layers=num_layers).save_pretrained(folder / "base")
    make_store(folder / "store")


def make_store(store: Path, *, num_shards: int = 1) -> None:
    """Writes shards of 64 drawn rows in groups of 8, and three held-out rows."""
    from layerplan.corpus.build import write_manifest
    from layerplan.corpus.manifest import Manifest, SourceRows
    from layerplan.corpus.pack import RawRow
    from layerplan.corpus.store import write_rows
    from layerplan.run_folder import VALIDATION_NAME

    store.mkdir()
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[RawRow]:
        return [
            RawRow(rng.integers(0, 128, 32, dtype=np.int32), np.array([0, 11], dtype=np.int32), 32)
            for _ in range(count)
        ]

    shards = [
        write_rows(store / f"shard_{number:06d}.parquet", draw(64), first_row_id=64 * number, rows_per_group=8)
        for number in range(num_shards)
    ]
    sizes = {"num_rows": 64 * num_shards, "num_tokens": 2048 * num_shards, "num_padding_tokens": 0}
    sizes["num_validation_rows"] = 3
    manifest = Manifest(
        **sizes,
        seq_len=32,
        rows_per_group=8,
        vocab_size=128,
        end_of_text_id=0,
        tokenizer_sha256="0",
        config_sha256="0",
        counts={},
        sources=[SourceRows(path="drawn", weight=None, num_validation_tokens=96, counts={}, **sizes)],
        shards=shards,
        validation=write_rows(store / VALIDATION_NAME, draw(3), first_row_id=-3, rows_per_group=8),
    )
    write_manifest(store, manifest)
