"""Document filters: small pure functions, each with the reason its drops are counted under."""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np

from layerplan.config.corpus import FilterConfig
from layerplan.corpus.codepoints import CJK_FIRST, CJK_LAST, encode_codes, fold_codes, hash_ngrams, load_tables

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
NGRAM = 10
SAMPLE_CHARS = 20_000
"""Characters that language and repetition are judged by."""
_BOUND_BITS = 16
_BOUND_FACTORS = {0: np.uint32(0x9E3779B1), 4: np.uint32(0x85EBCA77), NGRAM - 1: np.uint32(0xC2B2AE3D)}


def normalize_text(text: str) -> str:
    """NFC, Unix line ends, no control characters, no spaces around the whole."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", unicodedata.normalize("NFC", text)).strip()


def compute_duplicate_key(text: str) -> bytes:
    """16 bytes that are equal for texts equal up to case, width of characters and white space."""
    return hashlib.blake2b(fold_codes(encode_codes(text)).tobytes(), digest_size=16).digest()


def compute_line_repetition(text: str) -> float:
    """Share of the characters that stand in repeated lines, 0..1."""
    lines = [line.strip() for line in text.splitlines()]
    total = sum(map(len, lines))
    return (total - sum(map(len, set(lines)))) / total if total else 0.0


def compute_ngram_repetition(text: str) -> float:
    """Share of character 10-grams that occur before in the first 20,000 characters, 0..1."""
    hashes = np.sort(hash_ngrams(encode_codes(text[:SAMPLE_CHARS]), NGRAM))
    return int(np.count_nonzero(hashes[1:] == hashes[:-1])) / len(hashes) if len(hashes) > 1 else 0.0


def bound_ngram_repetition(text: str) -> float:
    """At least `compute_ngram_repetition`, in about half of its time.

    N-grams that agree in three characters, or share one of 65,536 slots, count as equal.
    """
    codes = encode_codes(text[:SAMPLE_CHARS])
    count = len(codes) - NGRAM + 1
    if count < 2:
        return 0.0
    slots = sum(codes[at : at + count] * factor for at, factor in _BOUND_FACTORS.items())
    seen = np.zeros(2**_BOUND_BITS, dtype=np.bool_)
    seen[slots >> np.uint32(32 - _BOUND_BITS)] = True
    return (count - int(np.count_nonzero(seen))) / count


def compute_cjk_ratio(text: str) -> float:
    """Share of Chinese characters among the letters of the first 20,000 characters, 0..1."""
    codes = encode_codes(text[:SAMPLE_CHARS])
    letters = codes[load_tables().letter[codes]]
    return float(np.mean((letters >= CJK_FIRST) & (letters <= CJK_LAST))) if len(letters) else 0.0


def find_filter_reason(text: str, score: float | None, filters: FilterConfig) -> str | None:
    """Returns the reason a normalised document is dropped for, or None when it is kept."""
    if filters.min_score is not None and score is not None and score < filters.min_score:
        return "score"
    if len(text) < filters.min_chars:
        return "too_short"
    if len(text) > filters.max_chars:
        return "too_long"
    if filters.min_cjk_ratio > 0 and compute_cjk_ratio(text) < filters.min_cjk_ratio:
        return "language"
    if filters.max_line_repetition < 1 and compute_line_repetition(text) > filters.max_line_repetition:
        return "line_repetition"
    limit = filters.max_ngram_repetition
    if limit < 1 and bound_ngram_repetition(text) > limit and compute_ngram_repetition(text) > limit:
        return "ngram_repetition"
    return None
