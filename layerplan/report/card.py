"""What a model card says once its model was scored: the report's first answers and the verdicts, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from layerplan.report.answer_tables import Table, describe_texts, show_text, tabulate_cost, tabulate_texts
from layerplan.report.answers import Answers, Continuation

BEGIN, END = "<!-- layerplan: results -->", "<!-- layerplan: end of results -->"


def add_results(card: str, answers: Answers, verdicts: Sequence[str]) -> str:
    """The card with its results, in place of those it had.

    Args:
        card: Text of the card.
        answers: Of the run.
        verdicts: Sentences on the benchmarks.
    """
    before, _, rest = card.partition(BEGIN)
    after = rest.partition(END)[2]
    lines = [*render_texts(answers, verdicts), *render_cost(answers), *_render_continuations(answers.continuations)]
    return f"{before.rstrip()}\n\n{BEGIN}\n" + "\n".join(lines) + f"\n{END}\n" + after.lstrip()


def render_texts(answers: Answers, verdicts: Sequence[str]) -> list[str]:
    """Texts before and after as a table, and a sentence on each and on each benchmark; nothing when there is neither."""
    table = tabulate_texts(answers)
    sentences = [*describe_texts(answers), *verdicts]
    if not table[1] and not sentences:
        return []
    return [
        "",
        "## Better than its base?",
        "",
        *render_card_rows(table),
        "",
        *(f"- {_escape(line)}" for line in sentences),
    ]


def render_cost(answers: Answers) -> list[str]:
    """What it cost as a table; nothing when that is not known."""
    return [] if answers.cost is None else ["", "## What it cost", "", *render_card_rows(tabulate_cost(answers.cost))]


def _render_continuations(items: Sequence[Continuation]) -> list[str]:
    if not items:
        return []
    lines = ["", "## What it says", "", "Continued greedily by the base and by this model."]
    for item in items:
        for who, text in (("Prompt", item.prompt), ("Base", item.base), ("This model", item.trained)):
            lines += ["", f"{who}:", "", *_fence(show_text(text))]
    return lines


def render_card_rows(table: Table) -> list[str]:
    """A table as lines of Markdown; none without rows."""
    headings, rows = table
    if not rows:
        return []
    return [_render_row(headings), "|---" * len(headings) + "|", *map(_render_row, rows)]


def _render_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    """Text that stands for itself: names are a user's, and a card is shown on web pages."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _fence(text: str) -> list[str]:
    """A block longer than any run of backquotes in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    mark = "`" * max(3, longest + 1)
    return [mark + "text", text, mark]
