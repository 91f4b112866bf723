"""Prompts as token ids, and the token at which the four letters are told apart.

The `official` style reads the bare letter's token. The `lm_eval` style answers with " A": when that is one token it is
read; when a tokenizer splits it into a common beginning and the letter, the beginning is appended to the prompt, which
shifts all four log-likelihoods alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.items import LETTERS
from layerplan.errors import EvaluationError


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
    if prefix:
        context = tokenizer.encode(cue, add_special_tokens=False)
        found = [tokenizer.encode(cue + prefix + letter, add_special_tokens=False) for letter in LETTERS]
        found = [ids[len(context) :] for ids in found]
    else:
        found = [tokenizer.encode(letter, add_special_tokens=False) for letter in LETTERS]
    shared = tuple(found[0][:-1])
    wrong = [
        letter for letter, ids in zip(LETTERS, found) if not ids or tuple(ids[:-1]) != shared or (shared and not prefix)
    ]
    last = [ids[-1] for ids in found if ids]
    wrong += [letter for letter, ids in zip(LETTERS, found) if ids and last.count(ids[-1]) > 1]
    if wrong:
        letter = wrong[0]
        raise EvaluationError(
            f"{model}: its tokenizer has no single token of its own for the answer {prefix + letter!r};"
            " the letters' log-probabilities need single tokens"
        )
    a, b, c, d = (ids[-1] for ids in found)
    return AnswerTokens(appended=shared, letters=(a, b, c, d))


def encode_prompts(tokenizer: Any, prompts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of many prompts at once, without truncation."""
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    return [encoding.ids for encoding in fast.encode_batch_fast(list(prompts), add_special_tokens=add_special_tokens)]
