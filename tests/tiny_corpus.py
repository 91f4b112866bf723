"""Text without repetitions, files of it, and a tokenizer whose tokens can be counted by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers


def make_byte_tokenizer(folder: Path) -> Path:
    """Writes `tokenizer.json`: one token per byte, and one for the end of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)} | {"<|endoftext|>": len(letters)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def make_text(number: int, size: int = 300) -> str:
    """Chinese characters of about `size` bytes, their own for every number."""
    rng = np.random.default_rng(number)
    return "".join(map(chr, rng.integers(0x4E00, 0x9FA0, size // 3).tolist()))


def write_jsonl(path: Path, *records: Any) -> None:
    """One record a line; compressed where the name ends in `.gz`."""
    content = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
