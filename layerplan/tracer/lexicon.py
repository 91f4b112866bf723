"""The words probes are made of: the project's own lexicon, or an AntSynNET folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from layerplan.errors import ProbeError

LEXICON_NAME = "lexicon.tsv"
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Lexicon:
    """Word pairs by relation; translations map an English word to its antonym in the other language."""

    adjective_antonyms: Pairs
    noun_antonyms: Pairs
    verb_antonyms: Pairs
    adjective_synonyms: Pairs
    antonyms_french: Pairs
    antonyms_spanish: Pairs


def load_builtin_lexicon() -> Lexicon:
    """The project's own lexicon: tab-separated `relation, word, word`."""
    text = resources.files("layerplan.tracer").joinpath(LEXICON_NAME).read_text(encoding="utf-8")
    relations: dict[str, list[tuple[str, str]]] = {name: [] for name in Lexicon.__dataclass_fields__}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            relation, first, second = line.split("\t")
            relations[relation].append((first, second))
    return Lexicon(**{name: tuple(pairs) for name, pairs in relations.items()})


def load_antsynnet(folder: Path) -> Lexicon:
    """Reads antonyms and synonyms from `{adjective,noun,verb}-pairs.*`; translations stay the builtin ones.

    Raises:
        ProbeError: When a file is missing or a line is not `word, word, 0 or 1`.
    """
    found = {
        (kind, label): tuple(pair for pair, mark in _read_pairs(folder, kind) if mark == label)
        for kind in ("adjective", "noun", "verb")
        for label in ("0", "1")
    }
    return replace(
        load_builtin_lexicon(),
        adjective_antonyms=found["adjective", "1"],
        noun_antonyms=found["noun", "1"],
        verb_antonyms=found["verb", "1"],
        adjective_synonyms=found["adjective", "0"],
    )


def _read_pairs(folder: Path, kind: str) -> list[tuple[tuple[str, str], str]]:
    files = sorted(folder.glob(f"{kind}-pairs.*"))
    if not files:
        raise ProbeError(f"trace.probes={folder}: no {kind}-pairs.* file; an AntSynNET folder is expected")
    rows = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            parts = line.split()
            if len(parts) != 3 or parts[2] not in ("0", "1"):
                raise ProbeError(f"trace.probes: {path}:{number}: expected two words and 0 or 1, got {line!r}")
            rows.append(((parts[0], parts[1]), parts[2]))
    return rows
