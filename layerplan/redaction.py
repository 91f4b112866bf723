"""What a message, a log or an artifact may show of an address: everything but its credentials.

An address can carry them in two places: before the `@` of its authority, and as a value of its query. No name says for
certain which value of a query is secret, so one is shown only when neither its name nor its looks speak for a credential.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"
"""Stands where a credential stood."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s\"'`<>]+")
_SECRET_NAME = re.compile(r"token|key|secret|pass|pwd|sig|cred|auth|session|code", re.IGNORECASE)
_LONGEST_WORD = 20
_SHORTEST_SECRET = 4
"""A shorter one stands in too many words to be taken out wherever it is met; inside its address it is hidden anyway."""


def redact_uri(uri: str) -> str:
    """The address without user, password and the query values that may be credentials.

    User and password go together, since a token is often given as the user alone. A password may hold `/`, `?` and `@`
    unescaped, so that everything up to the last `@` goes.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if _has_user(rest):
        rest = f"{HIDDEN}@{rest.rpartition('@')[2]}"
    where, mark, query = rest.partition("?")
    query, hash_mark, fragment = query.partition("#")
    shown = "&".join(map(_redact_parameter, query.split("&")))
    return f"{scheme}://{where}{mark}{shown}{hash_mark}{fragment and HIDDEN}"


def redact_text(text: str, *uris: str | None) -> str:
    """The text with every address in it redacted.

    Args:
        text: A message, perhaps of a library.
        uris: Addresses whose credentials are taken out wherever they stand, in an address or alone; None is ignored.
    """
    text = _ADDRESS.sub(lambda found: redact_uri(found.group()), text)
    for secret in sorted({secret for uri in uris if uri for secret in find_credentials(uri)}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redact_values(value: Any) -> Any:
    """A JSON-like value with every address in its strings redacted."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, Mapping):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


def find_hidden(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, address) of the strings of a JSON-like value whose credentials were hidden."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from find_hidden(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from find_hidden(item, f"{path}.{index}")
    elif isinstance(value, str) and any(HIDDEN in found for found in _ADDRESS.findall(value)):
        yield path, value


def find_credentials(uri: str) -> set[str]:
    """The credentials an address carries, as written and decoded; those too short to be looked for are left out."""
    _, _, rest = uri.partition("://")
    found: set[str] = set()
    if _has_user(rest):
        user, _, rest = rest.rpartition("@")
        name, _, password = user.partition(":")
        found |= {user, password or name}
    for parameter in rest.partition("?")[2].partition("#")[0].split("&"):
        if _redact_parameter(parameter) != parameter:
            found.add(parameter.partition("=")[2])
    found |= {decode(secret) for secret in found for decode in (unquote, unquote_plus)}
    return {secret for secret in found if len(secret) >= _SHORTEST_SECRET}


def _has_user(rest: str) -> bool:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return "@" in authority or (":" in authority and "@" in rest)


def _redact_parameter(parameter: str) -> str:
    name, separator, value = parameter.partition("=")
    return f"{name}={HIDDEN}" if separator and value and _may_be_secret(name, unquote(value)) else parameter


def _may_be_secret(name: str, value: str) -> bool:
    """By its name; or by its looks: letters and digits mixed in one word, a long word, or a user of its own."""
    words = re.findall(r"[A-Za-z0-9]+", value)
    mixed = any(not word.isalpha() and not word.isdigit() for word in words)
    return bool(_SECRET_NAME.search(name)) or mixed or "@" in value or any(len(word) > _LONGEST_WORD for word in words)
