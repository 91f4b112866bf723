"""Text to token ids, by the `tokenizers` library or by one that gives the same ids in a fraction of the time.

`fastokens` is many times as fast as `tokenizers`. A sample of what it gives is held against `tokenizers` all the time: the
first text, and one in `CHECK_EVERY` after it, chosen by what it says and not by when it comes.

A control token that a text spells out stays text, unless the tokens are asked for.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, Protocol

import fastokens
import numpy as np
from tokenizers import Tokenizer

from layerplan.errors import CorpusError
from layerplan.models.control_tokens import hide_control_tokens

CHECK_EVERY = 128
"""Texts of which one is encoded by both libraries."""

ControlPolicy = Literal["text", "token"]
"""What a control token spelled out in a text becomes."""

_FIELD = "corpus.tokenizer_library=auto"
_REMEDY = "set it to tokenizers, and remove the unfinished store"
_LOOK_ALIKES = ("\u017f", "\u212a")
"""Long s and the Kelvin sign: the libraries disagree whether a pattern that ignores case means them by s and k."""


class Encoder(Protocol):
    """Gives each text's token ids as int32 in the machine's byte order."""

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Encodes the texts one by one, without tokens that a tokenizer adds around a text."""
        ...


class TokenizersEncoder:
    """The `tokenizers` library: every kind of tokenizer, and the ids all others are held against."""

    def __init__(self, tokenizer_json: str, control_tokens: ControlPolicy = "text") -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per actor; the pool is the parallelism
        self._tokenizer = Tokenizer.from_str(_strip_settings(tokenizer_json, control_tokens))
        self._tokenizer.encode_special_tokens = control_tokens == "text"

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Encodes the texts one by one."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [_pack_ids(each.ids) for each in encoded]


class FastokensEncoder:
    """The `fastokens` library: byte pairs only, a sample of them checked against `tokenizers`.

    Raises:
        ValueError: When it does not know the kind of tokenizer.
    """

    def __init__(self, tokenizer_json: str, control_tokens: ControlPolicy = "text") -> None:
        os.environ["FASTOKENS_BPE_THREADS"] = "1"
        self._tokenizer = fastokens.Tokenizer.from_json_str(_strip_settings(tokenizer_json, control_tokens))
        self._reference = TokenizersEncoder(tokenizer_json, control_tokens)
        self._as_text = control_tokens == "text"
        self._is_checked = False

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Encodes the texts one by one.

        Raises:
            CorpusError: When it cannot encode one of them, or `tokenizers` gives other ids.
        """
        try:
            ids, offsets = self._tokenizer.encode_batch_flat(
                list(texts), add_special_tokens=False, split_special_tokens=self._as_text
            )
        except ValueError as error:
            raise CorpusError(f"{_FIELD}: fastokens cannot encode the text ({error}); {_REMEDY}") from None
        ends = (np.frombuffer(offsets, dtype=np.uint64) * 4).tolist()
        encoded = [ids[start:end] for start, end in pairwise(ends)]
        for place, text in enumerate(texts):
            if any(mark in text for mark in _LOOK_ALIKES):
                (encoded[place],) = self._reference.encode([text])
            elif not self._is_checked or is_in_sample(text):
                self._check(text, encoded[place])
        return encoded

    def _check(self, text: str, found: bytes) -> None:
        (expected,) = self._reference.encode([text])
        self._is_checked = True
        if found != expected:
            raise CorpusError(
                f"{_FIELD}: fastokens gives other ids than tokenizers for the text that starts with {text[:40]!r}; {_REMEDY}"
            )


def is_in_sample(text: str) -> bool:
    """Whether a text is among those that both libraries encode: one in `CHECK_EVERY`, by its first 256 characters."""
    return zlib.crc32(text[:256].encode()) % CHECK_EVERY == 0


def explain_fallback(tokenizer_json: str, library: Literal["auto", "tokenizers"]) -> str | None:
    """Why `auto` takes the slow library, if it does."""
    if library == "auto":
        try:
            fastokens.Tokenizer.from_json_str(_strip_settings(tokenizer_json, "token"))
        except ValueError as error:
            return f"encodes with tokenizers: fastokens does not know this kind ({error})"
    return None


def load_encoder(
    tokenizer_json: str, library: Literal["auto", "tokenizers"], control_tokens: ControlPolicy = "text"
) -> Encoder:
    """The encoder for a tokenizer; `auto` takes the fastest library that knows its kind."""
    if library == "auto":
        try:
            return FastokensEncoder(tokenizer_json, control_tokens)
        except ValueError:
            pass
    return TokenizersEncoder(tokenizer_json, control_tokens)


@lru_cache(maxsize=2)
def _strip_settings(tokenizer_json: str, control_tokens: ControlPolicy) -> str:
    """Takes away what is meant for other uses of a tokenizer: truncation, padding, random merges, control tokens."""
    content = json.loads(tokenizer_json)
    content["truncation"] = content["padding"] = None
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
    if control_tokens == "text":
        content = hide_control_tokens(content)
    return json.dumps(content, ensure_ascii=False)


def _pack_ids(ids: list[int]) -> bytes:
    """Int32 as numpy reads them; half the time of numpy's own conversion."""
    return struct.pack(f"{len(ids)}i", *ids)
