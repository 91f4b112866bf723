"""What an injected fault came to, and the table of many."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN_CHARS = 200
_FOLDER = re.compile(r"/\S*?/chaos\w+/")
"""A storm's own, which is gone when its table is read."""


@dataclass(frozen=True)
class Outcome:
    """One fault."""

    injected: str
    """Its kind; the rows of the table."""
    said: str
    """The line the user saw, or nothing."""
    lost: str = ""
    """What was lost, or used although it was wrong; nothing in a run as it should be."""
    met: bool = True
    """Whether it hurt something: a process that lived and then died or stood still, a file that was there."""


def render_table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table with one row for each kind of fault, in the order they came."""
    rows = ["| injected | met | missed | said, the first of them | lost |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(outcome.injected for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.injected == kind]
        met = [outcome for outcome in mine if outcome.met]
        spoken = [outcome.said for outcome in met or mine if outcome.said]
        lost = list(dict.fromkeys(outcome.lost for outcome in mine if outcome.lost))
        silent = len(met or mine) - len(spoken)
        said = _cell(spoken[0]) if spoken else "nothing: no value changed"
        note = f" ({silent} without effect)" if spoken and silent else ""
        cells = (kind, len(met), len(mine) - len(met), said + note, _cell("; ".join(lost)) or "nothing")
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    line = _FOLDER.sub("", " ".join(text.split())).replace("|", "\\|")
    return line if len(line) <= _SHOWN_CHARS else line[:_SHOWN_CHARS] + " …"
