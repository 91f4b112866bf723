"""Text from outside in a Markdown page: it is shown, and does nothing else there."""

from __future__ import annotations

import html
import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]+")
_ACTIVE = {character: f"&#{ord(character)};" for character in "[]`|*\\"}
_ACTIVE_TABLE = str.maketrans(_ACTIVE)


def as_text(text: str) -> str:
    """The text as one line in which no HTML, link, code, emphasis or table cell begins or ends."""
    return html.escape(_CONTROL.sub(" ", text), quote=False).translate(_ACTIVE_TABLE)


def as_code(text: str) -> str:
    """The text as a code span; a backtick, which would end it, becomes an apostrophe."""
    return f"`{_CONTROL.sub(' ', text).replace('`', chr(39))}`"
