r"""One answer out of generated text, or none: never a substring test.

Python's `\b` counts Chinese characters as word characters, so `选A是` would have no boundary around A; boundaries here
are between a letter and anything that is not a Latin letter or digit. The rules are tried in order; the first that
decides wins.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from eval.items import LETTERS

EXTRACTION_VERSION = 1

_NEXT_QUESTION = re.compile(r"\n\s*\n|\n\s*(?:题目|问题|以下是|Question|Q\s*:|\d+\s*[.、)])")
_ALONE = r"(?<![A-Za-z0-9])([A-D])(?![A-Za-z0-9'’])"
_LEADING = re.compile(r"^[\s\W_]*" + _ALONE)
_LIST_AFTER = re.compile(r"^\s*(?:[,，、/&+]|and\b|or\b|和|或|与|及)\s*[A-D](?![A-Za-z0-9])")
_REJECTED_AFTER = re.compile(r"^\s*(?:选项|项)?\s*(?:不对|不正确|不是|错|is\s+(?:wrong|incorrect|not))", re.IGNORECASE)
_CUE = re.compile(
    r"(?:答案\s*(?:是|为|应为|应该是|选)?|故选|应选|正确选项\s*(?:是|为)?|正确的\s*(?:是|为)|选择|选|answer\s*(?:is|:)?|option|choose)"
    r"\s*[:：]?\s*[(（\[【\"“'‘]*\s*" + _ALONE,
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"(?:不|非|别|没有|未|勿|not|n't|never|isn't)\s*(?:应该|应|能|可|是|be|to|the|a|an)?\s*$", re.IGNORECASE
)
_NEGATED_CUE = re.compile(r"(?:不是|不为|不选|并非|is not|isn't)", re.IGNORECASE)


def extract_answer(output: str, choices: Sequence[str]) -> str | None:
    """Returns A, B, C or D, or None when the text gives no single answer.

    Args:
        output: Generated text, as it came.
        choices: The four options' texts in order.
    """
    text = unicodedata.normalize("NFKC", output)
    text = _NEXT_QUESTION.split(text.strip("\n"), maxsplit=1)[0].strip()
    options = [unicodedata.normalize("NFKC", choice).strip() for choice in choices]
    for rule in (_starts_with_option, _leading_letter, _letter_after_cue, _only_letter, _only_option):
        found = rule(text, options)
        if found is not None:
            return found
    return None


def _starts_with_option(text: str, options: Sequence[str]) -> str | None:
    """The output begins with an option's full text; the longest one wins, a tie decides nothing."""
    matches = [index for index, option in enumerate(options) if _is_prefix(option, text)]
    if not matches:
        return None
    longest = max(len(options[index]) for index in matches)
    best = [index for index in matches if len(options[index]) == longest]
    return LETTERS[best[0]] if len(best) == 1 else None


def _is_prefix(option: str, text: str) -> bool:
    return len(option) >= 2 and re.match(_as_words(option), text) is not None


def _occurs(option: str, text: str) -> bool:
    return re.search(_as_words(option), text) is not None


def _as_words(option: str) -> str:
    """The option's text; a Latin letter or digit at its ends must end a word there."""
    before = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", option) else ""
    after = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", option) else ""
    return before + re.escape(option) + after


def _leading_letter(text: str, options: Sequence[str]) -> str | None:
    """First letter after leading punctuation, unless it starts a word or a list of letters."""
    match = _LEADING.match(text)
    if match is None or _LIST_AFTER.match(text[match.end() :]) or _REJECTED_AFTER.match(text[match.end() :]):
        return None
    if re.match(r"\s+[a-z]", text[match.end() :]) and match.group(1) == "A":
        return None  # the article of an English sentence
    return match.group(1)


def _letter_after_cue(text: str, options: Sequence[str]) -> str | None:
    """A cue and a letter that nothing negates; several cues must agree."""
    found = {
        match.group(1)
        for match in _CUE.finditer(text)
        if not _NEGATION.search(text[: match.start()])
        and not _NEGATED_CUE.search(match.group(0))
        and not _LIST_AFTER.match(text[match.end() :])
    }
    return found.pop() if len(found) == 1 else None


def _only_letter(text: str, options: Sequence[str]) -> str | None:
    """Exactly one distinct stand-alone letter, not negated."""
    matches = list(re.finditer(_ALONE, text))
    letters = {match.group(1) for match in matches}
    if len(letters) != 1 or any(_is_rejected(text, match) for match in matches):
        return None
    if letters == {"A"} and all(re.match(r"\s+[a-z]", text[match.end() :]) for match in matches):
        return None
    return letters.pop()


def _is_rejected(text: str, match: re.Match[str]) -> bool:
    before = re.search(r"(?:不是|不选|并非|not)\s*$", text[: match.start()])
    return before is not None or _REJECTED_AFTER.match(text[match.end() :]) is not None


def _only_option(text: str, options: Sequence[str]) -> str | None:
    """Exactly one option's text occurs; an option inside a longer one that also occurs does not count."""
    present = [index for index, option in enumerate(options) if len(option) >= 2 and _occurs(option, text)]
    outer = [
        index
        for index in present
        if not any(options[index] != options[other] and options[index] in options[other] for other in present)
    ]
    return LETTERS[outer[0]] if len(outer) == 1 else None
