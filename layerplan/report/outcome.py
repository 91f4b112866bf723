"""The top of the page: is the text better than before, what did it cost, what does the model say now."""

from __future__ import annotations

from layerplan.report.answer_tables import (
    describe_held_out,
    describe_validation,
    show_text,
    tabulate_cost,
    tabulate_texts,
)
from layerplan.report.answers import Answers, Cost
from layerplan.report.headline import rate_text
from layerplan.report.html_parts import render_sentence, render_table

FULL_RATE = (
    "The full rate is that of large matrix products, measured on the workers before training or taken from the GPU's data"
    " sheet; work per token is computed from the model's sizes and the plan, not counted."
)


def render_outcome(answers: Answers) -> str:
    """HTML of the three answers; what a run has not come to is left out."""
    return _render_texts(answers) + _render_cost(answers.cost) + _render_continuations(answers)


def _render_texts(answers: Answers) -> str:
    if answers.final_step is None:
        return ""
    text = "<h2>Is it better than before?</h2>"
    headings, rows = tabulate_texts(answers)
    if not rows:
        return text + "<p>Not measured: the corpus has no validation rows and there is no held-out text.</p>"
    text += "".join(map(render_sentence, describe_validation(answers.validation)))
    text += "".join(render_sentence(describe_held_out(item), rate_text(item)) for item in answers.held_out)
    note = "Lower is better. Intervals and p are over documents; the validation loss has neither."
    return text + render_table(headings, rows) + f'<p class="soft">{note}</p>'


def _render_cost(cost: Cost | None) -> str:
    if cost is None:
        return ""
    headings, rows = tabulate_cost(cost)
    title = "What it will cost" if cost.train_s is None else "What it cost"
    return f'<h2>{title}</h2>{render_table(headings, rows)}<p class="soft">{FULL_RATE}</p>'


def _render_continuations(answers: Answers) -> str:
    if not answers.continuations:
        return ""
    trained = "trained" if answers.final_step is None else f"trained, step {answers.final_step:,}"
    rows = [[item.prompt, show_text(item.base), show_text(item.trained)] for item in answers.continuations]
    note = (
        "Each prompt is continued greedily, by the most likely token each time; empty lines at its start are left out, runs"
        " of them shortened."
    )
    return (
        "<h2>What it says now</h2>"
        + render_table(["prompt", "base", trained], rows, style="cases stack")
        + f'<p class="soft">{note}</p>'
    )
