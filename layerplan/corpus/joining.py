"""What stands around every document in a row of tokens: [begin] text end, and what its text may become.

A store says how its documents were joined, and is not gone on with in another way: the same tokenizer files may be read
differently by another version, and a model that saw both would have two ends of a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerplan.config.corpus import CorpusConfig
from layerplan.corpus.manifest import Manifest
from layerplan.errors import CorpusError
from layerplan.models.tokenizer_facts import Token, TokenizerFacts, read_tokenizer_facts


@dataclass(frozen=True)
class Joining:
    """How documents become one row of tokens.

    Attributes:
        facts: The tokenizer.
        begin: Tokens before each document.
        control_tokens: `text` or `token`: what a control token spelled out in a document becomes.
    """

    facts: TokenizerFacts
    begin: tuple[Token, ...]
    control_tokens: str

    @property
    def end_of_text_id(self) -> int:
        """Token after each document."""
        return self.facts.end.id

    @property
    def begin_ids(self) -> list[int]:
        """Tokens before each document."""
        return [token.id for token in self.begin]

    @property
    def num_ids(self) -> int:
        """One more than the highest id that the documents can yield."""
        return self.facts.num_ids if self.control_tokens == "token" else self.facts.num_text_ids

    def describe(self) -> dict[str, Any]:
        """The tokenizer's part of a manifest."""
        return {
            "vocab_size": self.num_ids,
            "end_of_text_id": self.end_of_text_id,
            "end_of_text": self.facts.end.text,
            "begin_ids": self.begin_ids,
            "control_tokens": self.control_tokens,
            "tokenizer_sha256": self.facts.sha256,
        }

    def __str__(self) -> str:
        return _describe(self.begin, self.facts.end, self.control_tokens)


def read_joining(config: CorpusConfig, tokenizer: Path) -> Joining:
    """Asks the tokenizer's files and the config.

    Raises:
        ModelError: When the files cannot be read or do not say what ends a text.
    """
    facts = read_tokenizer_facts(tokenizer, end_of_text=config.end_of_text)
    begin = facts.begin if config.begin_token == "auto" else ()
    return Joining(facts, begin, config.control_tokens)


def check_joining(manifest: Manifest, joining: Joining, store: Path | str) -> None:
    """Refuses a store whose documents are joined in another way than the config and the tokenizer say now.

    Raises:
        CorpusError: Naming both ways and how to go on with the store.
    """
    is_known = manifest.control_tokens != "unknown"
    found = (manifest.end_of_text_id, manifest.begin_ids, manifest.control_tokens if is_known else None)
    if found == (joining.end_of_text_id, joining.begin_ids, joining.control_tokens if is_known else None):
        return
    end, begin = joining.facts.name(manifest.end_of_text_id), tuple(map(joining.facts.name, manifest.begin_ids))
    policy = manifest.control_tokens if is_known else joining.control_tokens
    remedy = [f"corpus.end_of_text: {end.text!r}"] if end.id != joining.end_of_text_id else []
    if manifest.begin_ids != joining.begin_ids:
        remedy.append(f"corpus.begin_token: {'auto' if begin else 'none'}")
    if policy != joining.control_tokens:
        remedy.append(f"corpus.control_tokens: {policy}")
    raise CorpusError(
        f"{store}: its documents are {_describe(begin, end, policy)}, now they would be {joining}; remove it to"
        f" build it anew, or set {', '.join(remedy)} to go on with it"
    )


def describe_unknown(manifest: Manifest, store: Path | str) -> str | None:
    """What is not known of a store of an earlier version."""
    if manifest.control_tokens != "unknown":
        return None
    return (
        f"{store}: is of an earlier version: where a document spelled out a control token it has the token itself, and"
        " not counted"
    )


def _describe(begin: tuple[Token, ...], end: Token, control_tokens: str) -> str:
    start = f"begun with {' '.join(map(str, begin))} and " if begin else ""
    kept = "as text" if control_tokens == "text" else "as the tokens themselves"
    return f"{start}ended with {end}, control tokens in them {kept}"
