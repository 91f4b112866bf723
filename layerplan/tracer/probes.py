"""Probes: one example pair, a query, and the answer; ten groups in the paper's surface form.

`Example:good->Bad, no-Yes; Query:bad->` asks for `Good`. The context C is what stands before `Query:`; masking it
shows which layers still read it.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerplan.artifacts import compute_sha256
from layerplan.config.trace import TraceConfig
from layerplan.errors import ProbeError
from layerplan.tracer.lexicon import Lexicon, load_antsynnet, load_builtin_lexicon

BUILTIN = "builtin"
"""How a config calls the project's own lexicon."""

Style = Literal["mixed", "uniform"]
QUERY = "Query:"


@dataclass(frozen=True)
class Probe:
    """One prompt with its answer; the context ends where `Query:` begins."""

    id: str
    group: str
    prompt: str
    answer: str
    context_end: int
    """Character offset of the query."""


Pair = tuple[str, str]


@dataclass(frozen=True)
class ProbeGroup:
    """How a group turns lexicon entries into (question, answer) pairs."""

    name: str
    make_pairs: Callable[[Lexicon, random.Random], list[Pair]]


def _capitalised(source: str) -> Callable[[Lexicon, random.Random], list[Pair]]:
    def make(lexicon: Lexicon, rng: random.Random) -> list[Pair]:
        return [(word, other.capitalize()) for word, other in getattr(lexicon, source)]

    return make


def _translated(source: str) -> Callable[[Lexicon, random.Random], list[Pair]]:
    def make(lexicon: Lexicon, rng: random.Random) -> list[Pair]:
        return list(getattr(lexicon, source))

    return make


def _choose_antonym(lexicon: Lexicon, rng: random.Random) -> list[Pair]:
    """A word, then its antonym and an unrelated word in either order."""
    pairs = lexicon.adjective_antonyms
    related: dict[str, set[str]] = {}
    for first, second in (*pairs, *lexicon.adjective_synonyms):
        related.setdefault(first, set()).add(second)
        related.setdefault(second, set()).add(first)
    words = sorted(related)
    made = []
    for word, antonym in pairs:
        near = {word, antonym} | related[word] | related[antonym]
        other = next(drawn for drawn in iter(lambda: rng.choice(words), None) if drawn not in near)
        options = [antonym, other]
        rng.shuffle(options)
        made.append((f"{word} {' '.join(options)}", antonym))
    return made


def _choose_last(answer: Callable[[str, dict[str, str]], str]) -> Callable[[Lexicon, random.Random], list[Pair]]:
    """Two words and a last one, about which the question is."""

    def make(lexicon: Lexicon, rng: random.Random) -> list[Pair]:
        antonyms = dict(lexicon.adjective_antonyms)
        words = list(antonyms)
        return [(f"{rng.choice(words)} {rng.choice(words)} {word}", answer(word, antonyms)) for word in words]

    return make


GROUPS: tuple[ProbeGroup, ...] = (
    ProbeGroup("adjective_antonym_capitalise", _capitalised("adjective_antonyms")),
    ProbeGroup("noun_antonym_capitalise", _capitalised("noun_antonyms")),
    ProbeGroup("verb_antonym_capitalise", _capitalised("verb_antonyms")),
    ProbeGroup("adjective_synonym_capitalise", _capitalised("adjective_synonyms")),
    ProbeGroup("choose_adjective_antonym", _choose_antonym),
    ProbeGroup("choose_last_antonym", _choose_last(lambda word, antonyms: antonyms[word])),
    ProbeGroup("choose_last_capitalise", _choose_last(lambda word, _: word.capitalize())),
    ProbeGroup("choose_last_first_letter", _choose_last(lambda word, _: word[0])),
    ProbeGroup("antonym_french", _translated("antonyms_french")),
    ProbeGroup("antonym_spanish", _translated("antonyms_spanish")),
)


def make_probes(lexicon: Lexicon, *, per_group: int, style: Style, seed: int) -> list[Probe]:
    """Makes `per_group` probes of every group, a pure function of lexicon, style and seed.

    Raises:
        ProbeError: When the lexicon has too few entries for a group.
    """
    probes: list[Probe] = []
    for number, group in enumerate(GROUPS):
        rng = random.Random(f"{seed}/{number}")
        pairs = list(dict.fromkeys(group.make_pairs(lexicon, rng)))
        if len(pairs) < 3:
            raise ProbeError(f"trace.probes: group {group.name} has {len(pairs)} usable pairs, at least 3 are needed")
        # more probes than pairs ask for a pair again, behind other examples
        order = rng.sample(pairs, len(pairs))
        probes += [
            _make_probe(group.name, index, order[index % len(order)], pairs, style, rng) for index in range(per_group)
        ]
    return probes


def load_probes(path: Path) -> list[Probe]:
    """Reads custom probes: JSONL with the strings `id`, `group`, `prompt` and `answer`.

    The context is what stands before `Query:`, or the first `context_end` characters where a line gives that number.

    Raises:
        ProbeError: Naming the line or the probe's id.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"trace.probes={path}: cannot be read ({error})") from None
    probes = [_parse_probe(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not probes:
        raise ProbeError(f"trace.probes={path}: holds no probe")
    for name, count in Counter(probe.id for probe in probes).items():
        if count > 1:
            raise ProbeError(f"probe {name}: {path} holds {count} probes of this id")
    return probes


def hash_probes(probes: Sequence[Probe]) -> str:
    """Hash of everything that decides a measurement."""
    return compute_sha256([[probe.id, probe.group, probe.prompt, probe.answer, probe.context_end] for probe in probes])


def _make_probe(group: str, index: int, target: Pair, pairs: list[Pair], style: Style, rng: random.Random) -> Probe:
    query, answer = target
    examples = rng.sample([pair for pair in pairs if pair[0] != query], 2)
    second = "->" if style == "uniform" else "-"
    context = f"Example:{examples[0][0]}->{examples[0][1]}, {examples[1][0]}{second}{examples[1][1]}; "
    return Probe(f"{group}/{index:03d}", group, f"{context}{QUERY}{query}->", answer, len(context))


def _parse_probe(line: str, where: str) -> Probe:
    try:
        record: Any = json.loads(line)
        probe = {name: record[name] for name in ("id", "group", "prompt", "answer")}
    except (ValueError, KeyError, TypeError) as error:
        raise ProbeError(f"trace.probes: {where}: id, group, prompt and answer are expected ({error})") from None
    if not all(isinstance(value, str) for value in probe.values()):
        raise ProbeError(f"trace.probes: {where}: id, group, prompt and answer must be strings")
    return Probe(**probe, context_end=_find_context_end(probe, record.get("context_end")))


def _find_context_end(probe: dict[str, str], given: Any) -> int:
    prompt, name = probe["prompt"], probe["id"]
    if given is None:
        end = prompt.find(QUERY)
        if end < 0:
            raise ProbeError(f"probe {name}: its prompt has no {QUERY!r} and the line no context_end")
        query = prompt[end + len(QUERY) :]
    elif isinstance(given, int) and not isinstance(given, bool) and 0 <= given <= len(prompt):
        end, query = given, prompt[given:]
    else:
        raise ProbeError(f"probe {name}: context_end={given!r} must be a number from 0 to {len(prompt)}")
    if not query.strip():
        raise ProbeError(f"probe {name}: its query is empty")
    if not prompt[:end].strip():
        raise ProbeError(f"probe {name}: has no context before its query")
    return end


def collect_probes(config: TraceConfig) -> list[Probe]:
    """The probes the config names.

    Raises:
        ProbeError: When they cannot be read.
    """
    path = Path(config.probes).expanduser()
    if config.probes.endswith(".jsonl"):
        return load_probes(path)
    if config.probes == BUILTIN:
        lexicon = load_builtin_lexicon()
    elif path.is_dir():
        lexicon = load_antsynnet(path)
    else:
        raise ProbeError(f"trace.probes={config.probes}: expected `builtin`, a folder or a .jsonl file")
    return make_probes(lexicon, per_group=config.probes_per_group, style=config.probe_style, seed=config.seed)
