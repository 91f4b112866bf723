"""JSON that is not one value a line: an array of records, or records with line breaks in them, in bounded memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

PIECE_BYTES = 2**20
HEAD_BYTES = 1024
NOT_CLOSED = "the array is not closed; the file was cut short"
_BETWEEN = re.compile(r"[\s,\[\]\ufeff]*")
_BEGINS_APART = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[|\{\s*\n)")


class JsonFault(ValueError):
    """Where a file stops being JSON; what comes after cannot be told apart."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.position = position
        """First byte that could not be read."""


def begins_apart(head: bytes) -> bool:
    """Whether a file that begins so holds an array, or an object that goes on in the next line."""
    return _BEGINS_APART.match(head) is not None


def iter_values(stream: IO[bytes], *, max_bytes: int) -> Iterator[Any]:
    """Yields the members of top-level arrays and the values outside of them, in order.

    Bytes that are no UTF-8 become half surrogates, so that they cost their own record.

    Raises:
        JsonFault: At the first broken value, one of more than `max_bytes`, or an array that is not closed.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    parse = json.JSONDecoder().raw_decode
    text, position, taken, depth, size = "", 0, 0, 0, PIECE_BYTES
    while True:
        between = _BETWEEN.match(text, position)
        assert between is not None
        depth += between.group().count("[") - between.group().count("]")
        position = between.end()
        fault = None
        if position < len(text):
            try:
                value, position = parse(text, position)
            except (ValueError, RecursionError) as error:
                fault = error
            else:
                size = PIECE_BYTES
                yield value
                continue
        piece = stream.read(size) if len(text) - position < max_bytes else b""
        if not piece:
            at = taken - len(text[position:].encode("utf-8", "surrogateescape"))
            if fault is not None or depth:
                raise JsonFault(getattr(fault, "msg", str(fault)) if fault is not None else NOT_CLOSED, at) from None
            return
        taken, size = taken + len(piece), 2 * size
        text, position = text[position:] + decode(piece), 0
