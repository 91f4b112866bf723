"""What the page says first of a run whose last submission failed or was stopped: where, when and why."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from layerplan.artifacts import read_lines
from layerplan.report.answers import read_json
from layerplan.report.html_parts import render_sentence
from layerplan.run_folder import LINEAGE_NAME, RunFolder

_PARENT = "parent"
_WORDS = {"FAILED": "failed", "KILLED": "was stopped"}
_UNKNOWN = "The folder does not hold the reason; the command printed it."
_AGAIN = "What is finished is not repeated: submit the same run name again to continue."


@dataclass(frozen=True)
class Ending:
    """How the last submission of a run ended that did not finish."""

    status: str
    """`FAILED` or `KILLED`."""
    stage: str | None
    message: str | None
    """None when nobody wrote it down."""
    time: datetime


def render_ending(run: RunFolder) -> str:
    """HTML of it; empty for a run that finished, and for one that nothing is known of."""
    ending = read_ending(run)
    if ending is None:
        return ""
    where = f" in stage {ending.stage.replace('_', ' ')}" if ending.stage else ""
    said = f"The last submission of this run {_WORDS[ending.status]}{where} ({ending.time:%Y-%m-%d %H:%M:%S} UTC)"
    if ending.status == "KILLED":
        return render_sentence(f"{said}. {_AGAIN}")
    message = (ending.message or "").rstrip(". ")
    return render_sentence(f"{said}: {message}. {_AGAIN}" if message else f"{said}. {_UNKNOWN} {_AGAIN}", "worse")


def read_ending(run: RunFolder) -> Ending | None:
    """What the run wrote of its failure, else what its journal of the lineage tells; None without both."""
    written = read_json(run.failure)
    if written:
        time = datetime.fromisoformat(written["time"]).astimezone(UTC)
        return Ending("FAILED", written.get("stage"), written["error"], time)
    return _read_journal(run)


def _read_journal(run: RunFolder) -> Ending | None:
    """The first stage of the last submission that was closed as anything but finished."""
    closed = None
    for line in read_lines(run.tracking / LINEAGE_NAME):
        if line.get("run") == _PARENT and line.get("do") == "open":
            closed = None
        elif line.get("do") == "close" and closed is None and line.get("status") in _WORDS:
            closed = line
    if closed is None:
        return None
    stage = None if closed["run"] == _PARENT else str(closed["run"])
    return Ending(closed["status"], stage, None, datetime.fromtimestamp(closed["time"] / 1000, UTC))
