"""What an injected fault came to, and the table of a whole storm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN_CHARS = 200


@dataclass(frozen=True)
class Outcome:
    """One fault."""

    injected: str
    """Its kind; the rows of the table."""
    said: str
    """The line the user saw, or nothing."""
    lost: str = ""
    """What was lost, or used although it was wrong; nothing in a run as it should be."""


def render_table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table with one row for each kind of fault, in the order they came."""
    rows = ["| injected | times | said, the first of them | lost |", "|---|---|---|---|"]
    for kind in dict.fromkeys(outcome.injected for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.injected == kind]
        spoken = [outcome.said for outcome in mine if outcome.said]
        lost = list(dict.fromkeys(outcome.lost for outcome in mine if outcome.lost))
        silent = len(mine) - len(spoken)
        said = _cell(spoken[0]) if spoken else "nothing: no value changed"
        note = f" ({silent} without effect)" if spoken and silent else ""
        rows.append(f"| {kind} | {len(mine)} | {said}{note} | {_cell('; '.join(lost)) or 'nothing'} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= _SHOWN_CHARS else line[:_SHOWN_CHARS] + " …"
