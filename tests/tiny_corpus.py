"""Text without repetitions, files of it, and a tokenizer whose tokens can be counted by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.encoders import is_in_sample


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


def make_disagreement(folder: Path) -> CorpusConfig:
    """`tokenizer.json` and a corpus of 300 texts the libraries agree about, then one of the sample where they do not.

    `tokenizers` merges letters over a character that it has no token for; fastokens keeps them apart.
    """
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    texts = ["ab" * (30 + number) for number in range(300)]
    texts.append(next(text for number in range(5000) if is_in_sample(text := f"{number}" + "acb" * 40)))
    write_jsonl(folder / "raw.jsonl", *({"id": str(number), "text": text} for number, text in enumerate(texts)))
    fields: dict[str, Any] = {"seq_len": 16, "rows_per_group": 4, "groups_per_shard": 1, "validation_rows": 0}
    fields["filters"] = {"max_ngram_repetition": 1, "max_line_repetition": 1}
    return CorpusConfig(sources=[SourceConfig(path=str(folder / "raw.jsonl"))], **fields)
