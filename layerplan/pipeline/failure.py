"""Leaves word in a run's folder of what the run failed with, for whoever looks later.

It is printed where the run was submitted, which may be gone by then. A run that is taken up again forgets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from layerplan.artifacts import write_json
from layerplan.errors import StorageError, find_layerplan_error, first_line
from layerplan.redaction import redact_text
from layerplan.report.answers import read_json
from layerplan.run_folder import RunFolder
from layerplan.storage.working import find_home


@contextmanager
def noting_failure(folder: RunFolder) -> Iterator[None]:
    """Forgets an earlier failure, and leaves word of one within the block unless a stage has done so."""
    forget_failure(folder)
    try:
        yield
    except Exception as error:
        note_failure(folder, error)
        with suppress(StorageError):  # what the run failed with is to be told
            folder.carry()
        raise
    forget_failure(folder)  # of a stage that the run could do without


def note_failure(folder: RunFolder, error: Exception, stage: str | None = None) -> None:
    """Writes down a failure; one that is there already with the same error keeps its stage.

    Args:
        folder: The run's.
        error: What ended it.
        stage: Where; None when it was in none.
    """
    line = redact_text(_describe(error))
    with suppress(OSError):
        if folder.failure.exists() and read_json(folder.failure).get("error") == line:
            return
        write_json(folder.failure, {"time": datetime.now(UTC).isoformat(), "stage": stage, "error": line})


def forget_failure(folder: RunFolder) -> None:
    """Removes it here and where the run is kept."""
    folder.failure.unlink(missing_ok=True)
    if folder.mirror is not None:
        find_home(folder.failure).unlink(missing_ok=True)


def _describe(error: Exception) -> str:
    """All faults of ours in one line; class and first line of another one."""
    fault = find_layerplan_error(error)
    if fault is None:
        return f"{type(error).__name__}: {first_line(error)}"
    return "; ".join(line.strip() for line in str(fault).splitlines() if line.strip()) or type(fault).__name__
