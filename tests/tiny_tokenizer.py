"""Model folders that hold a tokenizer and what is said about it, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_bytes(words: tuple[str, ...] = ()) -> Tokenizer:
    """One entry per byte, then the words, which no merge makes."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate((*BYTES, *words))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_pieces(pieces: tuple[str, ...]) -> Tokenizer:
    """As SentencePiece's unigrams: the pieces, control tokens among them, and a dummy space before a text."""
    tokenizer = Tokenizer(models.Unigram([(piece, -float(len(pieces) - len(piece))) for piece in pieces], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def save_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    control: tuple[str, ...] = (),
    ordinary: tuple[str, ...] = (),
    begin: tuple[str, ...] = (),
    **files: dict[str, Any],
) -> Path:
    """Writes `tokenizer.json` and the files named, such as `config`; returns the folder.

    Args:
        folder: Where to; made when it is not there.
        tokenizer: Model and pre-tokenizer.
        control: Added tokens that are special.
        ordinary: Added tokens that are not.
        begin: Tokens that the post-processor puts before a text.
        files: Content of `<name>.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ordinary])
    if begin:
        template = " ".join([*(f"{text}:0" for text in begin), "$A:0"])
        known = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(begin)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder
