"""Pieces of a page: tables of escaped text, and figures as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure


def render_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, style: str = "") -> str:
    """An HTML table that scrolls by itself where the page is narrower; every cell is escaped."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    opening = f'<table class="{style}">' if style else "<table>"
    return f'<div class="scroll">{opening}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def embed_svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
