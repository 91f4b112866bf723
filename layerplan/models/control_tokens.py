"""Control tokens spelled out in text: found, counted, and kept from becoming the tokens themselves.

A web page that explains `<|endoftext|>` must not end a document. Which added tokens are control tokens is what the
tokenizer file says (`special: true`); added tokens that are not special are part of the vocabulary like any other.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

NEIGHBOURS = ("", "\n", " ", "a", "0", "。")
"""Text before a piece: whether and how a piece can be reached depends on what stands there."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_PREFIX_CHARS = 2


class ControlTokens:
    """The control tokens of a tokenizer file."""

    def __init__(self, tokenizer_json: str) -> None:
        added = json.loads(tokenizer_json).get("added_tokens") or []
        texts = sorted({each["content"] for each in added if each.get("special")}, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._prefixes = sorted({text[:_PREFIX_CHARS] for text in texts})

    def count(self, text: str) -> int:
        """How many control tokens a text spells out, the longest at each place."""
        # a search for two characters is many times as fast as a pattern, and finds nothing in nearly every text
        if self._pattern is None or not any(prefix in text for prefix in self._prefixes):
            return 0
        return sum(1 for _ in self._pattern.finditer(text))


def hide_control_tokens(content: dict[str, Any]) -> dict[str, Any]:
    """Takes the names of control tokens away where a tokenizer's own vocabulary would find them in text.

    Both libraries can be told to pass over control tokens, but then a vocabulary that lists them (Unigram, whole words)
    may find them a second time. Their ids stay; nothing that text can hold leads to them.

    Args:
        content: A parsed `tokenizer.json`; left as it is.
    """
    found = _find_reachable(content)
    if not found:
        return content
    model = dict(content["model"])
    names = {text: f"\0control {number}\0" for number, text in enumerate(sorted(found))}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, found)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [each for each in content["added_tokens"] if each["content"] not in names]
    return content | {"model": model, "added_tokens": added, "post_processor": None}


def _find_reachable(content: dict[str, Any]) -> set[str]:
    """Control tokens that the vocabulary lists and that their own text leads to though they are passed over."""
    listed = content["model"].get("vocab", ())
    pieces = set(listed) if isinstance(listed, dict) else {piece for piece, _ in listed}
    special = {each["content"]: each["id"] for each in content.get("added_tokens") or [] if each.get("special")}
    inside = {text: number for text, number in special.items() if text in pieces and not _BYTE_PIECE.fullmatch(text)}
    if not inside:
        return set()
    tokenizer = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    tokenizer.encode_special_tokens = True
    return {text for text, number in inside.items() if is_reached(tokenizer, number, text)}


def is_reached(tokenizer: Tokenizer, number: int, text: str) -> bool:
    """Whether a text leads to an id, alone or after other text."""
    return any(number in tokenizer.encode(before + text, add_special_tokens=False).ids for before in NEIGHBOURS)


def _touches(merge: str | list[str], names: set[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return bool({left, right, left + right} & names)
