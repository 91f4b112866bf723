"""Document filters: small pure functions, each with the reason its drops are counted under."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter

from layerplan.config.corpus import FilterConfig

_SPACES = re.compile(r"\s+")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
NGRAM = 10


def normalize_text(text: str) -> str:
    """NFC, Unix line ends, no control characters, no spaces around the whole."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROL.sub("", text).strip()


def compute_duplicate_key(text: str) -> bytes:
    """16 bytes that are equal for texts equal up to case and white space."""
    canonical = _SPACES.sub(" ", unicodedata.normalize("NFKC", text)).strip().lower()
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def compute_line_repetition(text: str) -> float:
    """Share of the characters that stand in repeated lines, 0..1."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    total = sum(map(len, lines))
    repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items() if count > 1)
    return repeated / total if total else 0.0


def compute_ngram_repetition(text: str) -> float:
    """Share of character 10-grams that occur before in the first 20,000 characters, 0..1."""
    head = text[:20_000]
    total = len(head) - NGRAM + 1
    return 1 - len({head[i : i + NGRAM] for i in range(total)}) / total if total > 0 else 0.0


def compute_cjk_ratio(text: str) -> float:
    """Share of Chinese characters among the letters of the first 20,000 characters, 0..1."""
    letters = [character for character in text[:20_000] if character.isalpha()]
    return sum("\u4e00" <= character <= "\u9fff" for character in letters) / len(letters) if letters else 0.0


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
    if compute_line_repetition(text) > filters.max_line_repetition:
        return "line_repetition"
    if compute_ngram_repetition(text) > filters.max_ngram_repetition:
        return "ngram_repetition"
    return None
