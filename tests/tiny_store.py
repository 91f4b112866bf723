"""A model and a token store that train in milliseconds, made without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def make_inputs(folder: Path, *, num_layers: int = 2) -> None:
    """Writes `folder/base`, a random model, and `folder/store`, 64 rows of 32 tokens in two documents each."""
    from layerplan.corpus.manifest import MANIFEST_NAME, VALIDATION_NAME, Manifest, SourceRows
    from layerplan.corpus.pack import RawRow
    from layerplan.corpus.store import write_rows
    from tests.qwen3 import build_tiny_qwen3

    build_tiny_qwen3(vocab_size=128, num_hidden_layers=num_layers).save_pretrained(folder / "base")
    store = folder / "store"
    store.mkdir()
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[RawRow]:
        return [
            RawRow(rng.integers(0, 128, 32, dtype=np.int32), np.array([0, 11], dtype=np.int32), 32)
            for _ in range(count)
        ]

    shard = write_rows(store / "shard_000000.parquet", draw(64), first_row_id=0, rows_per_group=8)
    write_rows(store / VALIDATION_NAME, draw(3), first_row_id=-3, rows_per_group=8)
    sizes = {"num_rows": 64, "num_validation_rows": 3, "num_tokens": 2048, "num_padding_tokens": 0}
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
        shards=[shard],
    )
    (store / MANIFEST_NAME).write_text(manifest.model_dump_json())
