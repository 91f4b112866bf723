"""The top of the page in one line, for a reader who knows nothing yet: better, worse or not to be told, and on what."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from layerplan.plan.layer_profile import ModelSource
from layerplan.plan.permutation import SIGNIFICANT
from layerplan.report.answer_tables import describe_change
from layerplan.report.answers import Answers, HeldOutText

Outcome = Literal["better", "worse", "alike", "unjudged", "broken"]
Clause = tuple[Outcome, str]
CLAUSES: dict[Outcome, str] = {
    "better": "better than its base on {}",
    "worse": "worse than its base on {}",
    "alike": "no difference from its base could be told on {}",
    "unjudged": "too few documents to judge {}",
    "broken": "no finite loss, and so no judgement, on {}",
}
_MEANING = f"Better and worse: beyond chance at {SIGNIFICANT:.0%}, corrected for the number of comparisons."


def rate(gain: float, adjusted_p: float) -> Outcome:
    """What a difference says.

    Args:
        gain: Above 0 where the trained model is better.
        adjusted_p: Of no difference.
    """
    if adjusted_p >= SIGNIFICANT:
        return "alike"
    return "better" if gain > 0 else "worse"


def rate_text(text: HeldOutText) -> Outcome:
    """What a held-out text says; fewer bits are better."""
    if not text.is_judged:
        return "broken" if "not finite" in text.sentence else "unjudged"
    return rate(text.base - text.trained, text.adjusted_p)


def rate_verdict(verdict: Mapping[str, Any]) -> Outcome:
    """What a benchmark says; a higher accuracy is better."""
    return rate(verdict["difference"], verdict["adjusted_p"])


def list_clauses(answers: Answers, verdicts: Sequence[Mapping[str, Any]]) -> list[Clause]:
    """What was compared with the base, gathered by outcome; empty when nothing was.

    Args:
        answers: Of the run.
        verdicts: On benchmarks, as the run wrote them.
    """
    texts = [(rate_text(text), _name_text(text)) for text in answers.held_out]
    benchmarks = [(rate_verdict(item), f"{item['benchmark']}/{item['protocol']}") for item in verdicts]
    clauses: list[Clause] = []
    for outcome, words in CLAUSES.items():
        kinds = [
            _name_all(kind, [name for each, name in found if each == outcome])
            for kind, found in (("text", texts), ("benchmark", benchmarks))
        ]
        if named := [name for name in kinds if name]:
            clauses.append((outcome, words.format(" and ".join(named))))
    loss = answers.validation
    if not clauses and loss is not None and loss.base is not None:
        change = describe_change(loss.base, loss.trained)
        clauses.append(("unjudged", f"validation loss {change}; nothing else was compared with the base"))
    return clauses


def say_headline(clauses: Sequence[Clause]) -> str:
    """The clauses as one sentence."""
    text = "; ".join(words for _, words in clauses)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def render_headline(clauses: Sequence[Clause]) -> str:
    """The same as HTML, coloured by outcome."""
    if not clauses:
        return ""
    words = [text for _, text in clauses]
    words[0] = words[0][0].upper() + words[0][1:]
    spans = [f'<span class="{outcome}">{html.escape(text)}</span>' for (outcome, _), text in zip(clauses, words)]
    tested = any(outcome in ("better", "worse", "alike") for outcome, _ in clauses)
    return f'<p class="lead">{"; ".join(spans)}.</p>' + (f'<p class="soft">{_MEANING}</p>' if tested else "")


def describe_repair(source: ModelSource) -> str:
    """What a run on de-quantised weights does not separate."""
    return (
        f"the base was de-quantised from {source.file}, so a part of any gain may repair rounded weights; the same run on"
        " general text tells it apart"
    )


def describe_built_in(benchmarks: Sequence[str]) -> str:
    """What was asked under these names, where it was the package's own questions."""
    return (
        f"{' and '.join(benchmarks)}: a small set of layerplan's own questions in the benchmark's format was asked, not the"
        " benchmark; set its path to hub or to a folder for that"
    )


def _name_text(text: HeldOutText) -> str:
    return f"{text.name} (which may be trained on)" if text.may_be_trained_on else text.name


def _name_all(kind: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"the {kind}{'s' if len(names) > 1 else ''} {listed}"
