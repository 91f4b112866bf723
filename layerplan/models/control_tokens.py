"""Control tokens spelled out in text: found, counted, and kept from becoming the tokens themselves.

A web page that explains `<|endoftext|>` must not end a document. Which added tokens are control tokens is what the
tokenizer file says (`special: true`); added tokens that are not special are part of the vocabulary like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer

NEIGHBOURS = ("", "\n", " ", "a", "0", "。")
"""Text before a piece: whether and how a piece can be reached depends on what stands there."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class ControlTokens:
    """Finds control tokens in text.

    Args:
        names: Their texts.
    """

    def __init__(self, names: Iterable[str]) -> None:
        texts = sorted({name for name in names if name})
        self._pattern = re.compile(_join_alternatives(texts)) if texts else None

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> ControlTokens:
        """The added tokens of a tokenizer that are special."""
        return cls(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)

    @classmethod
    def from_json(cls, tokenizer_json: str) -> ControlTokens:
        """Those of a `tokenizer.json`."""
        added = json.loads(tokenizer_json).get("added_tokens") or []
        return cls(each["content"] for each in added if each.get("special"))

    def count(self, text: str) -> int:
        """How many control tokens a text spells out, the longest at each place."""
        return len(self._pattern.findall(text)) if self._pattern is not None else 0


def _join_alternatives(texts: Sequence[str]) -> str:
    """A pattern of sorted texts that shares their beginnings, the longest first.

    Some models have hundreds of control tokens that begin alike; tried one by one at every "<" they would cost as much as
    a tenth of the tokenizer.
    """
    is_end = "" in texts
    groups = groupby((text for text in texts if text), key=lambda text: text[0])
    parts = [re.escape(first) + _join_alternatives([text[1:] for text in group]) for first, group in groups]
    if len(parts) > 1 or (parts and is_end):
        return f"(?:{'|'.join(parts)}){'?' if is_end else ''}"
    return "".join(parts)


def read_control_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of a tokenizer to which control tokens are text."""
    copy = Tokenizer.from_str(json.dumps(hide_control_tokens(json.loads(tokenizer.to_str())), ensure_ascii=False))
    copy.encode_special_tokens = True
    return copy


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
