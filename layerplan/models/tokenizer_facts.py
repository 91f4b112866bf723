"""What must be known of a tokenizer, read once from the model's own files and used by every stage.

Which token ends a text is asked in this order, and the first that names an entry of the tokenizer is taken, as
`transformers` does for the first two:

1. `tokenizer_config.json` (`eos_token`, a string or an AddedToken); `special_tokens_map.json` goes before it where the
   config has no `added_tokens_decoder`, the older layout
2. `config.json`, then `generation_config.json` (`eos_token_id`, an id or a list, of which the first counts)
3. the token that the tokenizer itself puts after a text
4. the only entry with one of the customary names

What the tokenizer puts before a text is asked of the tokenizer: it encodes one with and without.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from layerplan.artifacts import hash_bytes
from layerplan.errors import ModelError
from layerplan.models.control_tokens import is_reached
from layerplan.models.files import TOKENIZER_SIBLINGS, stamp_files

CUSTOMARY_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_PROBES = ("a", "的", "0", " ")
_UNKNOWN = "\U000f0000"
"""A private character: the id of unknown text, where a tokenizer has one."""


@dataclass(frozen=True)
class Token:
    """One entry of a tokenizer."""

    id: int
    text: str

    def __str__(self) -> str:
        return f"{self.text!r} ({self.id})"


@dataclass(frozen=True)
class TokenizerFacts:
    """What a model's files say about its tokenizer.

    Attributes:
        path: Its `tokenizer.json`.
        json_text: Content of that file.
        sha256: Hash of that file.
        num_entries: Entries, added ones included.
        num_text_ids: One more than the highest id that ordinary text, the begin or the end can yield.
        num_ids: The same when text may hold control tokens.
        end: Token that ends a text.
        end_source: What named it.
        begin: Tokens that the tokenizer itself puts before a text; mostly none or one.
        named_begin: Token that the files call the beginning, whether or not it is put there.
        pad: Token that the files call padding.
        control: Added tokens that are special.
        added: Added tokens that are not, and so are found in text.
        notes: One line for each conflict between the files.
    """

    path: Path
    json_text: str = field(repr=False)
    sha256: str
    num_entries: int
    num_text_ids: int
    num_ids: int
    end: Token
    end_source: str
    begin: tuple[Token, ...]
    named_begin: Token | None
    pad: Token | None
    control: tuple[Token, ...] = field(repr=False)
    added: tuple[Token, ...] = field(repr=False)
    notes: tuple[str, ...]

    def name(self, number: int) -> Token:
        """An entry by its id; reads the whole file, for messages."""
        return Token(number, str(Tokenizer.from_str(self.json_text).id_to_token(number)))


@dataclass(frozen=True)
class _Claim:
    """What one file says; `ids` is empty where it names no entry of the tokenizer."""

    source: str
    value: object
    ids: tuple[int, ...]


def read_tokenizer_facts(path: Path, *, end_of_text: str | None = None) -> TokenizerFacts:
    """Reads `tokenizer.json` and the files beside it.

    Args:
        path: `tokenizer.json`, or the folder that holds it.
        end_of_text: The token that ends a text, by its name, where the user says so.

    Raises:
        ModelError: When a file cannot be read, `end_of_text` is no entry, or nothing says which token ends a text.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return _read(file, end_of_text, stamp_files(_list_files(file)))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from None


def describe_tokenizer(facts: TokenizerFacts) -> list[str]:
    """What the files say, a line each."""
    begin = " ".join(map(str, facts.begin)) or "nothing"
    beyond = facts.num_ids - facts.num_text_ids
    return [
        f"{facts.num_entries:,} entries; text yields ids below {facts.num_text_ids:,}"
        + (f", control tokens {beyond:,} more" if beyond else ""),
        f"end of text {facts.end}, named by {facts.end_source}; before a text {begin}; padding {facts.pad or 'none'}",
        f"{len(facts.control):,} control tokens, {len(facts.added):,} other added tokens",
        *facts.notes,
    ]


@lru_cache(maxsize=8)
def _read(file: Path, end_of_text: str | None, changed: tuple[tuple[str, int, int], ...]) -> TokenizerFacts:
    """Reads the files anew when one of them has `changed`."""
    content = file.read_bytes()
    text = content.decode("utf-8")
    tokenizer = _parse(file, text)
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    begin_ids, after_ids = find_surroundings(tokenizer)
    ends = _list_claims(file.parent, tokenizer, "eos")
    end_id, end_source = _choose_end(file, tokenizer, ends, after_ids, end_of_text)
    control_ids = {number for number, token in added if token.special}
    highest = _find_highest(tokenizer, control_ids)
    around = max(end_id, *begin_ids, highest)

    def name(number: int) -> Token:
        return Token(number, str(tokenizer.id_to_token(number)))

    return TokenizerFacts(
        path=file,
        json_text=text,
        sha256=hash_bytes(content),
        num_entries=tokenizer.get_vocab_size(),
        num_text_ids=around + 1,
        num_ids=max(around, *control_ids, 0) + 1,
        end=name(end_id),
        end_source=end_source,
        begin=tuple(map(name, begin_ids)),
        named_begin=_first(_list_claims(file.parent, tokenizer, "bos"), name),
        pad=_first(_list_claims(file.parent, tokenizer, "pad"), name),
        control=tuple(name(number) for number, token in added if token.special),
        added=tuple(name(number) for number, token in added if not token.special),
        notes=_describe_conflict(ends, name(end_id), end_source),
    )


def _list_files(file: Path) -> list[Path]:
    return [file, *(path for name in TOKENIZER_SIBLINGS if (path := file.with_name(name)).is_file())]


def _parse(file: Path, text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower class
        raise ModelError(f"{file}: is not a readable tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def find_surroundings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer itself puts before and after a text, found by encoding one with and without."""
    for probe in _PROBES:
        bare = tokenizer.encode(probe, add_special_tokens=False).ids
        whole = tokenizer.encode(probe).ids
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
    return [], []


def _list_claims(folder: Path, tokenizer: Tokenizer, role: str) -> list[_Claim]:
    """What the files say about a role (`eos`, `bos` or `pad`), in the order in which they are believed."""
    config = _load(folder / "tokenizer_config.json")
    named = [("tokenizer_config.json", config), ("special_tokens_map.json", _load(folder / "special_tokens_map.json"))]
    if "added_tokens_decoder" not in config:
        named.reverse()
    values = [(source, content.get(f"{role}_token")) for source, content in named]
    for source in ("config.json", "generation_config.json"):
        content = _load(folder / source)
        values.append((source, content.get(f"{role}_token_id", content.get("text_config", {}).get(f"{role}_token_id"))))
    return [_Claim(source, value, _resolve(tokenizer, value)) for source, value in values if value is not None]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    return content if isinstance(content, dict) else {}


def _resolve(tokenizer: Tokenizer, value: object) -> tuple[int, ...]:
    """The entries that a file's value names: a text, an AddedToken, an id or a list of ids."""
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, str):
        found = tokenizer.token_to_id(value)
        return () if found is None else (found,)
    ids = value if isinstance(value, list) else [value]
    return tuple(each for each in ids if isinstance(each, int) and tokenizer.id_to_token(each) is not None)


def _choose_end(
    file: Path, tokenizer: Tokenizer, claims: list[_Claim], after_ids: list[int], asked: str | None
) -> tuple[int, str]:
    """The token that ends a text, and what named it."""
    if asked is not None:
        found = tokenizer.token_to_id(asked)
        if found is None:
            raise ModelError(f"corpus.end_of_text={asked!r}: {file} has no such entry")
        return found, "corpus.end_of_text"
    for claim in claims:
        if claim.ids:
            return claim.ids[0], claim.source
    if after_ids:
        return after_ids[-1], "what the tokenizer puts after a text"
    known = {name: found for name in CUSTOMARY_ENDS if (found := tokenizer.token_to_id(name)) is not None}
    if len(known) == 1:
        return next(iter(known.values())), "its name alone, as no file says"
    said = "".join(f"; {claim.source} names {claim.value!r}, which is no entry" for claim in claims)
    raise ModelError(
        f"{file}: no file names the end-of-text token{said}; set corpus.end_of_text"
        + (f" to one of {', '.join(known)}" if known else " to the entry that ends a text")
    )


def _describe_conflict(claims: list[_Claim], end: Token, source: str) -> tuple[str, ...]:
    """One line when files name other tokens than the one taken."""
    others = [
        f"{claim.source} {json.dumps(claim.value, ensure_ascii=False)}" + ("" if claim.ids else " (no entry)")
        for claim in claims
        if end.id not in claim.ids
    ]
    return (f"end of text: {source} names {end}, but {', '.join(others)}; the first is taken",) if others else ()


def _first(claims: list[_Claim], name: Callable[[int], Token]) -> Token | None:
    return next((name(claim.ids[0]) for claim in claims if claim.ids), None)


def _find_highest(tokenizer: Tokenizer, control_ids: set[int]) -> int:
    """The highest id that ordinary text yields: from the last entry down, the first that its own text leads to.

    When an entry is the result for a stretch of text, it is so for that stretch alone too, whatever stood around it.
    """
    unknown = set(tokenizer.encode(_UNKNOWN, add_special_tokens=False).ids)
    for number in sorted(tokenizer.get_vocab().values(), reverse=True):
        if number in unknown or (number not in control_ids and _is_yielded(tokenizer, number)):
            return int(number)
    return 0


def _is_yielded(tokenizer: Tokenizer, number: int) -> bool:
    piece, text = str(tokenizer.id_to_token(number)), tokenizer.decode([number], skip_special_tokens=False)
    if "\ufffd" in text:
        return True  # part of a character: no text of its own to try
    return any(is_reached(tokenizer, number, each) for each in {text, piece, piece.replace("▁", " ")})
