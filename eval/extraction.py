r"""One answer out of generated text, or none: never a substring test.

Python's `\b` counts Chinese characters as word characters, so `选A是` would have no boundary around A; boundaries here
are between a letter and anything that is not a Latin letter or digit. The rules are tried in order; the first that
decides wins, and two candidates of one rule that disagree decide that there is no answer:

1. the output begins with an option's full text;
2. it begins with a letter that is no article, no member of a list and not called wrong;
3. a phrase that names the answer (`答案`, `故选`, `the answer is`, `\boxed`) and a letter or an option's text after it,
   whatever stands between them of brackets, emphasis and `选项`;
4. a phrase that names a choice (`选`, `option`, `choose`) and a letter after it;
5. the one letter that is left when those that are called wrong are taken away;
6. the only option whose text occurs.

Lower-case letters are read by 3 and 4 alone: without a phrase before it `a` is an article.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from eval.items import LETTERS

EXTRACTION_VERSION = 3

NEAR_CHARS = 60
UNDECIDED = ""
"""A rule's finding that the output gives several answers, which no later rule may mend."""

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_NEXT_QUESTION = re.compile(
    r"(?<!:)(?<!: )(?<!:\*\*)\n\s*\n|\n\s*(?:题目|问题|以下是|Question|Q\s*:|\d+\s*[.、)])"
)  # a blank line after `答案：` still belongs to the answer

_LETTER = r"(?<![A-Za-z0-9\\])([A-D])(?![A-Za-z0-9'’])"
_JOINT = r"\s*(?:[,、/&+]|and\b|or\b|nor\b|和|或者?|与|及|还是)\s*"
_RUN = re.compile(_LETTER + rf"(?:{_JOINT}(?:[A-D])(?![A-Za-z0-9'’]))*")
_BETWEEN = re.compile(r"\s+|\s*[;|]\s*")
"""Between bare letters these make a list; `A because` and `A; B is wrong` are none."""
_LIST_END = re.compile(r"[^\S\n]*[.。!]?[^\S\n]*(?:\n|$)")
_ADVERB = r"(?:也|都|均|则|就|显然|明显|肯定|是|为)"
_BE = r"(?:(?:is|are|was|were)\s+(?:also\s+|both\s+|all\s+|clearly\s+|obviously\s+)?)"
_WRONG = re.compile(
    rf"^[\s*_`)\]】」”\"'’]*(?:选?项)?\s*{_ADVERB}*\s*(?:不对|不正确|不是(?!\s*[A-D])|不符|不成立|不选(?!\s*[A-D])|错|有误)"
    rf"|^[\s*_`)\]\"'’]*{_BE}(?:wrong|incorrect|false|not)\b|^\s*(?:isn|aren)['’]t\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"(?:不是|不选|不为|并非|排除|除了|not|n['’]t(?: be)?|except|than|exclude|eliminate)[\s*_(\[【]*$", re.IGNORECASE
)
_AFTER_ARTICLE = r"\s+(?!(?:is|are|was|because|since|as|and|or|nor|but|so|due|which|would|seems?)\b)"
_ARTICLE = re.compile(_AFTER_ARTICLE + "[a-z]")
_ARTICLE_LOWER = re.compile(_AFTER_ARTICLE + "[A-Za-z]")
_ECHO = re.compile(r"^\W*A\s*[.、:)].*?\sB\s*[.、:)]", re.DOTALL)

_DRESS = r"(?:[\s*_`~#$\"'“”‘’「」『』《》〈〉【】〔〕\[\](){}<>:=→]|\\(?:boxed|fbox|text(?:bf|it|rm)?|math(?:rm|bf|sf)|[(\[]))*"
_NOUN = r"(?:选项|项|(?:option|choice|letter)\b)?"
_TARGET = rf"{_DRESS}{_NOUN}{_DRESS}(?<![A-Za-z0-9\\])([A-Da-d])(?![A-Za-z0-9'’-])"
_NAMES_ANSWER = (
    r"(?:答案(?:[^A-Za-z,。;.!?\n不非没未否错]{0,8}?(?:是|为|选择?|即))??"
    r"|故选择?|应选择?|正确的?选项(?:应该|应|就)?(?:是|为)?|不?正确的(?:是|为)"
    r"|(?:answer|(?:correct|right|best|final|my)\s+(?:choice|option))\b(?:[^.;!?\n]{0,40}?\b(?:is|are|be|was))??"
    r"(?:\s+(?:definitely|clearly|obviously|probably|likely|most\s+likely|therefore|thus|simply|actually))*"
    r"|\\boxed)"
)
_ANSWER = re.compile(_NAMES_ANSWER + _TARGET, re.IGNORECASE)
_CHOICE = re.compile(r"(?:选择|选项|选|option|choose|choosing|select|pick)" + _TARGET, re.IGNORECASE)
_ANSWER_TEXT = re.compile(
    rf"(?:答案\s*(?:应该|应|就)?(?:是|为|选)?|\banswer\b(?:\s+is)?|\\boxed){_DRESS}", re.IGNORECASE
)
_NEGATION = re.compile(
    r"(?:不|非|别|没有|未|勿|无法|\bnot|n['’]t|\bnever|\bcannot)(?:\s*(?:应该|应|能|可|会|是|认为|觉得|确定|相信|知道"
    r"|be|to|the|an?|think|believe|sure|know|say|that|if|whether|correct|right))*\s*$",
    re.IGNORECASE,
)
_NEGATED_CUE = re.compile(r"不是|不为|不选|并非|\bnot\b|n['’]t\b|\bnever\b|\b(?:wrong|incorrect)\b", re.IGNORECASE)
_ASKED = re.compile(r"^[\s*_)\]】」”\"]*(?:选?项)?\s*[吗呢]")
_RIGHT_TOO = re.compile(r"^\s*选?项?\s*也\s*(?:是|对|正确|可)|^\s+is\s+also\s+(?:right|correct|true)\b")
_LOWER_STOPS = re.compile(r"^\s*(?!选?项|因为|由于|是|正确|对)[㐀-鿿]")


@dataclass(frozen=True)
class _Run:
    """Letters that stand alone, or a list of them such as `A、B和C`."""

    start: int
    end: int
    letters: tuple[str, ...]
    is_rejected: bool
    """The text calls them wrong."""


def extract_answer(output: str, choices: Sequence[str]) -> str | None:
    """Returns A, B, C or D, or None when the text gives no single answer.

    Args:
        output: Generated text, as it came.
        choices: The four options' texts in order.
    """
    text = _THOUGHT.sub("", unicodedata.normalize("NFKC", output))
    text = _NEXT_QUESTION.split(text.strip(), maxsplit=1)[0].strip()
    options = [unicodedata.normalize("NFKC", choice).strip() for choice in choices]
    for rule in (_starts_with_option, _leading_letter, _named_answer, _named_choice, _only_letter, _only_option):
        found = rule(text, options)
        if found is not None:
            return found or None
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


def _as_words(option: str) -> str:
    """The option's text; a Latin letter or digit at its ends must end a word there."""
    before = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", option) else ""
    after = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", option) else ""
    return before + re.escape(option) + after


def _before(text: str, position: int) -> str:
    """The words right before a position: looking further back would take a long output the square of its length."""
    return text[max(0, position - NEAR_CHARS) : position]


def _list_runs(text: str) -> list[_Run]:
    """Upper-case letters and lists of them; those with nothing but spaces, line breaks, `;` or `|` between are one list."""
    runs: list[_Run] = []
    chain: list[_Run] = []
    for run in _iter_runs(text):
        if chain and (run.is_rejected or not _BETWEEN.fullmatch(text, chain[-1].end, run.start)):
            runs += _join_list(chain, text)
            chain = []
        if run.is_rejected:
            runs.append(run)
        else:
            chain.append(run)
    return runs + _join_list(chain, text)


def _join_list(chain: list[_Run], text: str) -> list[_Run]:
    """The runs as one where they are several letters and the line ends behind them; a letter said twice is one letter."""
    letters = tuple(dict.fromkeys(letter for run in chain for letter in run.letters))
    if len(chain) < 2 or len(letters) < 2 or not _LIST_END.match(text, chain[-1].end):
        return chain
    return [_Run(chain[0].start, chain[-1].end, letters, False)]


def _iter_runs(text: str) -> Iterator[_Run]:
    """Upper-case letters and lists of them that words or commas join, articles aside."""
    for match in _RUN.finditer(text):
        letters = tuple(re.findall(_LETTER, match.group(0)))
        start, end = match.span()
        if letters == ("A",) and _ARTICLE.match(text, end):
            continue
        is_wrong = _WRONG.match(text[end : end + NEAR_CHARS]) is not None
        if is_wrong and len(letters) == 2 and re.fullmatch(r"\w\s*,\s*\w", match.group(0)):
            yield _Run(start, start + 1, letters[:1], False)  # `B，A错` is two clauses, not a list
            start, letters = end - 1, letters[1:]
        yield _Run(start, end, letters, is_wrong or _DENIED.search(_before(text, start)) is not None)


def _leading_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter after leading punctuation, unless it begins a list, an article, or a copy of the options."""
    runs = _list_runs(text)
    if not runs or re.search(r"[^\W_]|\\", text[: runs[0].start]) or _ECHO.match(text):
        return None
    if any(_RIGHT_TOO.match(text[run.end : run.end + NEAR_CHARS]) for run in runs[1:]):
        return UNDECIDED
    first = runs[0]
    return first.letters[0] if len(first.letters) == 1 and not first.is_rejected else None


def _named_answer(text: str, options: Sequence[str]) -> str | None:
    return _agree(_find_after(_ANSWER, text, options)) or _agree(
        _starts_with_option(text[match.end() :], options)
        for match in _ANSWER_TEXT.finditer(text)
        if not _NEGATION.search(_before(text, match.start()))
    )


def _named_choice(text: str, options: Sequence[str]) -> str | None:
    return _agree(_find_after(_CHOICE, text, options))


def _agree(candidates: Iterator[str | None]) -> str | None:
    """The one candidate, None without any, `UNDECIDED` when they differ."""
    found = {letter for letter in candidates if letter is not None}
    if len(found) > 1:
        return UNDECIDED
    return found.pop() if found else None


def _find_after(cue: re.Pattern[str], text: str, options: Sequence[str]) -> Iterator[str | None]:
    """Letters after a cue that nothing negates, rejects or asks about."""
    runs = {run.start: run for run in _list_runs(text)}
    for match in cue.finditer(text):
        if _is_doubted(match, text) or _NEGATED_CUE.search(match.group(0)):
            continue
        yield _starts_with_option(text[match.start(1) :], options) or _read_letter(match, text, runs)


def _is_doubted(match: re.Match[str], text: str) -> bool:
    """Whether the text denies what the cue says, or asks for it."""
    return bool(
        _NEGATION.search(_before(text, match.start())) or _ASKED.match(text[match.end() : match.end() + NEAR_CHARS])
    )


def _read_letter(match: re.Match[str], text: str, runs: dict[int, _Run]) -> str | None:
    letter, rest = match.group(1), text[match.end() : match.end() + NEAR_CHARS]
    if letter.isupper():
        run = runs.get(match.start(1))
        if run is None:  # `answer is A big city`: only after a colon can a capital be an article
            return None if re.search(r":\W*$", _before(text, match.start(1))) else letter
        return None if run.is_rejected or len(run.letters) > 1 else letter
    if letter == "a" and _ARTICLE_LOWER.match(rest):
        return None
    is_word = _LOWER_STOPS.match(rest) or re.match(_JOINT + r"[A-Da-d](?![A-Za-z0-9])", rest) or _WRONG.match(rest)
    return None if is_word else letter.upper()


def _only_letter(text: str, options: Sequence[str]) -> str | None:
    """Exactly one letter stands alone, those that are called wrong and those inside an option's text aside."""
    for option in options:
        if len(option) >= 2 and re.search(_LETTER, option):
            text = text.replace(option, " " * len(option))
    doubted = {match.start(1) for cue in (_ANSWER, _CHOICE) for match in cue.finditer(text) if _is_doubted(match, text)}
    runs = [run for run in _list_runs(text) if not run.is_rejected and run.start not in doubted]
    letters = {letter for run in runs for letter in run.letters}
    return letters.pop() if len(letters) == 1 else None


def _only_option(text: str, options: Sequence[str]) -> str | None:
    """Exactly one option's text occurs; an option inside a longer one that also occurs does not count."""
    found = {
        index: match
        for index, option in enumerate(options)
        if len(option) >= 2 and (match := re.search(_as_words(option), text))
    }
    outer = [
        index
        for index in found
        if not any(options[index] != options[other] and options[index] in options[other] for other in found)
    ]
    if len(outer) != 1 or _DENIED.search(_before(text, found[outer[0]].start())):
        return None
    return LETTERS[outer[0]]
