"""Prompts as token ids, and the token at which the four letters are told apart.

Before a prompt stands what the tokenizer itself puts before a text, in both styles: models that begin with a token were
trained with it, and lm-evaluation-harness encodes so too. What a tokenizer puts after a text is left out, since the answer
follows the prompt.

The `official` style reads the letter's token as it follows the cue: a tokenizer that writes a letter at the start of a text
as "▁A" writes "A" there. The `lm_eval` style answers with " A": when that is one token it is read; when a tokenizer splits
it into a common beginning and the letter, the beginning is appended to the prompt, which shifts all four log-likelihoods
alike.

A control token that a question spells out is text in `official` style, as in a corpus; in `lm_eval` style it is the token,
as the harness has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval.items import LETTERS
from layerplan.errors import EvaluationError
from layerplan.models.control_tokens import ControlTokens, read_control_as_text
from layerplan.models.tokenizer_facts import find_surroundings

NEUTRAL = "\n"
"""Stands for a cue that a tokenizer joins with the letter to one token."""


@dataclass(frozen=True)
class AnswerTokens:
    """Where an answer begins."""

    appended: tuple[int, ...]
    """Tokens that all four answers share; they go to the end of the prompt."""
    letters: tuple[int, int, int, int]
    """Token ids of A to D after them."""


def find_answer_tokens(tokenizer: Any, model: str, *, cue: str, prefix: str) -> AnswerTokens:
    """Finds the four letters' tokens after a cue.

    Args:
        tokenizer: The model's fast tokenizer.
        model: Its name, for the error.
        cue: The end of every prompt.
        prefix: Text between the cue and the letter.

    Raises:
        EvaluationError: When the letters are not single, distinct tokens.
    """
    if prefix:  # cut by length, as the harness does
        start = len(_encode(tokenizer, cue))
        found = [_encode(tokenizer, cue + prefix + letter)[start:] for letter in LETTERS]
    else:
        found = _find_letters(tokenizer, cue)
    shared = tuple(found[0][:-1])
    letter = _find_unclear(found, shared if prefix else ())
    if letter is not None:
        raise EvaluationError(
            f"{model}: its tokenizer has no single token of its own for the answer {prefix + letter!r};"
            " the letters' log-probabilities need single tokens"
        )
    a, b, c, d = (ids[-1] for ids in found)
    return AnswerTokens(appended=shared, letters=(a, b, c, d))


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    add_special_tokens: bool,
    control_tokens: Literal["text", "token"] = "text",
) -> list[list[int]]:
    """Token ids of many prompts at once, without truncation.

    Args:
        tokenizer: The model's fast tokenizer.
        prompts: The texts.
        add_special_tokens: Whether to put before them what the tokenizer itself does.
        control_tokens: What a control token spelled out in a prompt becomes.
    """
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    begin = find_surroundings(fast)[0] if add_special_tokens else []
    if control_tokens == "text" and count_control_tokens(tokenizer, prompts):
        fast = read_control_as_text(fast)
    encoded = fast.encode_batch_fast(list(prompts), add_special_tokens=False)
    return [[*begin, *encoding.ids] for encoding in encoded]


def require_tokens(tokenizer: Any, documents: Sequence[str], name: str) -> None:
    """Raises `EvaluationError` when no document of a held-out text gives a token: spaces give none where they are stripped."""
    if not any(encode_prompts(tokenizer, [text], add_special_tokens=False)[0] for text in documents):
        raise EvaluationError(
            f"evaluation.held_out: {name}: the model's tokenizer makes no token of any of its {len(documents):,} documents"
        )


def find_first_id(tokenizer: Any, model: str) -> int:
    """The token that a text's first prediction looks back on: the beginning-, else the end-of-text token.

    Raises:
        EvaluationError: When the tokenizer has neither.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise EvaluationError(f"{model}: its tokenizer has neither a beginning nor an end-of-text token")
    return int(first)


def count_control_tokens(tokenizer: Any, texts: Sequence[str]) -> int:
    """How many control tokens the texts spell out."""
    control = ControlTokens.from_tokenizer(tokenizer.backend_tokenizer)
    return sum(map(control.count, texts))


def describe_encoding(tokenizer: Any, prompts: Sequence[str], tokens: AnswerTokens, *, style: str) -> str:
    """Where the prompts' ids are other than before these rules: a score by the old ones is not read back as this one.

    Empty for models without a begin token whose letters are the same everywhere.
    """
    parts = []
    if style == "lm_eval":
        begin = find_surroundings(tokenizer.backend_tokenizer)[0]
        parts += [f"begin {begin}"] if begin else []
    else:
        bare = tuple(ids[-1] for ids in (_encode(tokenizer, letter) for letter in LETTERS) if ids)
        parts += [f"letters {list(tokens.letters)}"] if tokens.letters != bare else []
        spelled = count_control_tokens(tokenizer, prompts)
        parts += [f"{spelled} control tokens as text"] if spelled else []
    return ", ".join(parts)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _find_letters(tokenizer: Any, cue: str) -> list[list[int]]:
    """Each letter's tokens after the cue, else after other text, else alone: the first way that tells them apart."""
    alone = [_encode(tokenizer, letter) for letter in LETTERS]
    for context in (cue, NEUTRAL) if cue else ():
        before = _encode(tokenizer, context)
        whole = [_encode(tokenizer, context + letter) for letter in LETTERS]
        found = [ids[len(before) :] for ids in whole]
        if all(ids[: len(before)] == before for ids in whole) and _find_unclear(found, ()) is None:
            return found
    return alone


def _find_unclear(found: Sequence[Sequence[int]], shared: tuple[int, ...]) -> str | None:
    """The first letter that is more than one token after the shared ones, or the same as another letter's."""
    wrong = [letter for letter, ids in zip(LETTERS, found) if not ids or tuple(ids[:-1]) != shared]
    last = [ids[-1] for ids in found if ids]
    wrong += [letter for letter, ids in zip(LETTERS, found) if ids and last.count(ids[-1]) > 1]
    return wrong[0] if wrong else None
