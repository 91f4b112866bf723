"""Prompts with a label, drawn: rows as a feed hands them to the loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from layerplan.corpus.rows import PackedRows, make_rows
from tests.qwen3 import TINY_QWEN3


def draw(starts: list[int], *, seed: int = 0, width: int = 9) -> PackedRows:
    """One row per start layer; prompts of 4 to 8 tokens, the label behind each."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, TINY_QWEN3["vocab_size"], (len(starts), width), dtype=np.int32)
    used = rng.integers(5, width + 1, len(starts)).astype(np.int32)
    rows = make_rows(np.arange(len(starts)), ids, [np.zeros(1, np.int32)] * len(starts), used)
    return replace(rows, start_layers=np.asarray(starts, dtype=np.int32))
