"""Message catalogues of installed packages as documents: each entry an English message and its translation.

Entries come in the order of their hashes, so that the first documents of a source are a random sample of it and can be
held out: a build drops from the corpus what a run holds out.
"""

from __future__ import annotations

import gettext
import importlib.metadata
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

ENTRIES_PER_DOCUMENT = 24
"""About half a page."""


def read_catalogues(language: str) -> Iterator[tuple[str, str]]:
    """Yields (document id, text) of every package's catalogues for a language, packages in order of their names."""
    for package, paths in find_catalogues(language):
        entries = {entry for path in paths for entry in read_entries(path)}
        ordered = sorted(entries, key=lambda entry: (xxhash.xxh64_intdigest("\n".join(entry).encode()), entry))
        for start in range(0, len(ordered), ENTRIES_PER_DOCUMENT):
            lines = (
                f"{message}: {translation}" for message, translation in ordered[start : start + ENTRIES_PER_DOCUMENT]
            )
            yield f"catalogue:{language}:{package}:{start // ENTRIES_PER_DOCUMENT}", "\n".join(lines)


def find_catalogues(language: str) -> list[tuple[str, list[Path]]]:
    """(package, its `.mo` files for the language) of every installed package that has some."""
    found: dict[str, list[Path]] = {}
    for distribution in importlib.metadata.distributions():
        files = [file for file in distribution.files or () if _is_catalogue(file.parts, language)]
        if files:
            found[distribution.metadata["Name"]] = sorted(Path(str(file.locate())) for file in files)
    return sorted(found.items())


def read_entries(path: Path) -> Iterable[tuple[str, str]]:
    """(message, translation) pairs of one catalogue, without its header and what is not translated."""
    try:
        with path.open("rb") as handle:
            catalogue = gettext.GNUTranslations(handle)._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, UnicodeDecodeError):
        return []
    return [
        (message, translation)
        for message, translation in catalogue.items()
        if isinstance(message, str) and message and translation and message != translation
    ]


def _is_catalogue(parts: tuple[str, ...], language: str) -> bool:
    return len(parts) > 2 and parts[-1].endswith(".mo") and parts[-2] == "LC_MESSAGES" and parts[-3] == language
