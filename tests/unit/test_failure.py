"""What a run failed with, as its folder and its page tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerplan.errors import ConfigError, CorpusError
from layerplan.pipeline.failure import note_failure, noting_failure
from layerplan.report.ending import render_ending
from layerplan.report.page import write_report
from layerplan.run_folder import RunFolder


class Carried:
    """Counts how often a folder is brought to its bucket."""

    def __init__(self) -> None:
        self.times = 0

    def carry(self) -> None:
        self.times += 1


def fail(folder: RunFolder, error: BaseException, stage: str | None = "corpus") -> None:
    """As a stage does it inside a run."""
    with noting_failure(folder):
        if isinstance(error, Exception) and stage is not None:
            note_failure(folder, error, stage)
        raise error


def test_a_failed_run_says_where_and_why_on_its_page(tmp_path: Path) -> None:
    carried = Carried()
    folder = RunFolder(tmp_path, carried)
    with pytest.raises(CorpusError):
        fail(folder, CorpusError("corpus.sources[0].path=/data/<x>: holds no document."))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<p class="verdict worse">The last submission of this run failed in stage corpus (20' in page
    assert " UTC): corpus.sources[0].path=/data/&lt;x&gt;: holds no document. What is finished is not repeated" in page
    assert carried.times == 1, "it is in the bucket too"


def test_a_fault_between_two_stages_names_none_and_all_its_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        fail(RunFolder(tmp_path), ConfigError("a: no", "b: no"), stage=None)
    shown = render_ending(RunFolder(tmp_path))
    assert "this run failed (20" in shown and "UTC): a: no; b: no. What" in shown


def test_a_fault_that_is_not_ours_shows_its_class_and_first_line_and_no_credential(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        fail(RunFolder(tmp_path), ValueError("https://me:secret@host/x refused\nat line 3"))
    said = json.loads(RunFolder(tmp_path).failure.read_text())
    assert (said["stage"], said["error"]) == ("corpus", "ValueError: https://***@host/x refused")


class Lost(BaseException):
    """As the lease raises it: the folder belongs to somebody else by then."""


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), SystemExit(143), Lost()])
def test_a_signal_is_no_failure(tmp_path: Path, signal: BaseException) -> None:
    with pytest.raises(type(signal)):
        fail(RunFolder(tmp_path), signal)
    assert not RunFolder(tmp_path).failure.exists() and render_ending(RunFolder(tmp_path)) == ""


def test_a_run_that_is_taken_up_again_forgets_it(tmp_path: Path) -> None:
    """A stage that the run could do without leaves nothing behind either."""
    folder = RunFolder(tmp_path)
    with pytest.raises(CorpusError):
        fail(folder, CorpusError("no"))
    with noting_failure(folder):
        assert render_ending(folder) == ""
        note_failure(folder, CorpusError("tried in vain"), "self_test")
    assert render_ending(folder) == ""


def test_runs_of_earlier_versions_tell_it_by_their_journal(tmp_path: Path) -> None:
    """The first stage of the last submission that did not finish; a submission that finished takes it back."""
    folder = RunFolder(tmp_path)
    lines = [
        {"run": "parent", "do": "open", "time": 0},
        {"run": "corpus", "do": "close", "status": "FAILED", "time": 1_795_800_455_347},
        {"run": "parent", "do": "close", "status": "FAILED", "time": 1_795_800_455_348},
    ]
    folder.tracking.mkdir()
    journal = folder.tracking / "lineage.jsonl"
    journal.write_text("\n".join(map(json.dumps, lines)) + "\n")
    shown = render_ending(folder)
    assert (
        "failed in stage corpus (2026-11-27 17:27:35 UTC). The folder does not hold the reason; the command printed it"
        in shown
    )
    again = [
        {"run": "parent", "do": "open", "time": 2},
        {"run": "parent", "do": "close", "status": "FINISHED", "time": 3},
    ]
    journal.write_text("\n".join(map(json.dumps, lines + again)) + "\n")
    assert render_ending(folder) == ""
    stopped = [
        {"run": "parent", "do": "open", "time": 4},
        {"run": "train", "do": "close", "status": "KILLED", "time": 5},
    ]
    journal.write_text("\n".join(map(json.dumps, lines + stopped)) + "\n")
    assert render_ending(folder).startswith(
        '<p class="verdict">The last submission of this run was stopped in stage train ('
    )
