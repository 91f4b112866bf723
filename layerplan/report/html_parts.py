"""Pieces of a page: tables of escaped text, sentences marked by their outcome, and figures as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

MIN_STACKED = 4
"""Columns from which on a narrow screen shows a row's cells below each other, each with its heading."""


def render_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, style: str = "") -> str:
    """An HTML table that scrolls by itself where the page is narrower; every cell is escaped.

    Args:
        headings: One per column.
        rows: Cells.
        style: Classes: `stack` puts the cells of a row below each other on a narrow screen, which tables of many columns
            do anyway.
    """
    is_stacked = len(headings) >= MIN_STACKED or "stack" in style.split()
    kinds = style.split() + (["facts"] if len(headings) == 2 else [])
    if is_stacked and "stack" not in kinds:
        kinds.append("stack")
    opening = f'<table class="{" ".join(kinds)}">' if kinds else "<table>"
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    labels = [f' data-label="{html.escape(heading, quote=True)}"' if is_stacked else "" for heading in headings]
    body = "".join(
        "<tr>" + "".join(f"<td{label}>{html.escape(cell)}</td>" for label, cell in zip(labels, row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll">{opening}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def render_sentence(text: str, outcome: str = "") -> str:
    """A finding as a paragraph with a bar at its side.

    Args:
        text: The sentence.
        outcome: `better` and `worse` colour the bar.
    """
    return f'<p class="{f"verdict {outcome}".strip()}">{html.escape(text)}</p>'


def embed_svg(figure: Figure) -> str:
    """The figure as an SVG element, which a narrow screen scrolls rather than shrinks its labels."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return make_wide(text[text.index("<svg") :])


def make_wide(picture: str) -> str:
    """A picture's element in a box that scrolls, with a hint where it has to."""
    return f'<div class="wide"><div class="scroll">{picture}</div></div>'
