"""`layerplan status`: what a table says of a run is what lies in its folder, and it follows one that goes on."""

from __future__ import annotations

import io
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from layerplan.artifacts import read_lines
from layerplan.cli import main
from layerplan.config.load import dump_config, validate_config
from layerplan.errors import ConfigError, CorpusError
from layerplan.pipeline.failure import note_failure
from layerplan.pipeline.run_lease import hold_run
from layerplan.pipeline.status import read_status
from layerplan.pipeline.status_table import show_status
from layerplan.run_folder import (
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    METRICS_NAME,
    PLAN_NAME,
    REPORT_NAME,
    RESULT_NAME,
    SELF_TEST_NAME,
    RunFolder,
)
from layerplan.tracking.jsonl import JsonlSink
from tests.tiny_checkpoint import save

VALUES = {
    "perf/tokens_per_s": 1200.0,
    "perf/mfu": 0.41,
    "perf/step_s": 3.0,
    "perf/data_wait_share": 0.02,
    "perf/peak_memory_gib": 1.5,
    "perf/predicted_memory_gib": 1.6,
    "perf/slowest_rank": 1.0,
    "perf/slowest_rank_behind_s": 0.25,
}


def make_run(root: Path) -> JsonlSink:
    """A run of 100 steps whose 40th was logged."""
    config = validate_config(
        {"name": "mine", "model": {"type": "pretrained", "name": "m"}, "train": {"max_steps": 100}}
    )
    root.mkdir()
    (root / CONFIG_NAME).write_text(dump_config(config))
    sink = JsonlSink(root / METRICS_NAME, "train", 0)
    sink.log_metrics({"train/loss": 5.0, **VALUES}, 1)
    sink.log_metrics({"validation/loss": 4.5}, 20)
    sink.log_metrics({"train/loss": 4.0, **VALUES}, 40)
    return sink


def test_the_table_says_what_lies_in_the_folder(tmp_path: Path):
    sink = make_run(tmp_path / "mine")
    sink.log_event("plan_change", 30, "layers 3-5 train")
    save(tmp_path / "mine" / CHECKPOINTS_NAME, 20)
    save(tmp_path / "mine" / CHECKPOINTS_NAME, 40)
    last = read_lines(tmp_path / "mine" / METRICS_NAME)[-1]["time"]
    status = read_status(str(tmp_path / "mine"), datetime.fromtimestamp(last / 1000 + 61, UTC))
    rows = dict(status.rows)
    assert status.name == "mine" and not status.is_running
    assert rows["state"] == "not running; submit the same run name again to continue"
    # 60 steps of 3 s are left
    assert rows["training"].endswith("40 of 100 steps (40.0%), 3 min left; last heard 61 s ago")
    assert rows["loss"] == "5.0000 -> 4.0000, held-out rows 4.5000"
    assert rows["speed"] == "1,200 tokens/s, MFU 41.0%, 3 s a step, 2.0% of it waiting for rows"
    assert rows["slowest"] == "rank 1, 0.25 s a step behind the first"
    assert rows["memory"] == "1.50 GiB of a worker at most, 1.60 predicted"
    assert rows["checkpoints"] == "2 kept, the newest of step 40"
    assert rows["event"] == "61 s ago, step 30: layers 3-5 train"
    assert "training ·" in rows["stages"] and "plan ·" in rows["stages"]


def test_stages_are_whole_at_work_to_come_or_passed_over(tmp_path: Path):
    """A plan that needs no trace; then a finished run that was given more steps: what was made of fewer is not whole."""
    root = tmp_path / "mine"
    make_run(root)
    for name in (SELF_TEST_NAME, PLAN_NAME):
        (root / name).write_text("{}")
    with hold_run(root, "mine"):
        running = dict(read_status(str(root), datetime.now(UTC)).rows)["stages"]
    after = "  export ·  scores ·  report ·"
    assert running == f"self-test ✓  plan ✓  training …{after}", "the corpus is given, and nothing was traced"
    values = dict.fromkeys(("first_loss", "final_loss", "train_s", "wall_s"), 1.0) | {"tokens_per_s": 900.0, "mfu": 0.3}
    values |= dict.fromkeys(("tokens_seen", "skipped_steps", "rollbacks"), 0) | {"proof": {}, "stopped_early": False}
    values |= {"final_step": 40, "final_checkpoint": "x", "validation_loss": None, "hf_dir": None}
    (root / RESULT_NAME).write_text(json.dumps(values))
    (root / REPORT_NAME).write_text("")
    rows = dict(read_status(str(root), datetime.now(UTC)).rows)
    assert rows["stages"] == f"self-test ✓  plan ✓  training ·{after}"
    assert rows["speed"].startswith("1,200 tokens/s")
    (root / RESULT_NAME).write_text(json.dumps(values | {"final_step": 100}))
    rows = dict(read_status(str(root), datetime.now(UTC)).rows)
    assert rows["state"] == "finished" and rows["speed"] == "900 tokens/s, MFU 30.0% over all steps"


def test_what_a_run_failed_with_is_said_until_it_is_taken_up_again(tmp_path: Path):
    root = tmp_path / "mine"
    make_run(root)
    note_failure(RunFolder(root), CorpusError("corpus.sources.0.path=/x: no such file"))
    state = dict(read_status(str(root), datetime.now(UTC)).rows)["state"]
    assert state == "failed: corpus.sources.0.path=/x: no such file; submit the same run name again to continue"


def test_a_run_that_somebody_holds_runs_until_it_gives_no_sign_of_life(tmp_path: Path):
    make_run(tmp_path / "mine")
    with hold_run(tmp_path / "mine", "mine"):
        now = datetime.now(UTC)
        held = read_status(str(tmp_path / "mine"), now)
        silent = read_status(str(tmp_path / "mine"), now + timedelta(minutes=10))
    assert held.is_running and dict(held.rows)["state"].startswith("running: process ")
    assert not silent.is_running and dict(silent.rows)["state"].startswith("no sign of life for 10 min: process ")


def test_a_run_that_waits_for_its_turn_says_its_place(tmp_path: Path):
    make_run(tmp_path / "mine")

    def read_state_until(is_there: str) -> str:
        deadline = time.monotonic() + 30
        while True:
            state = dict(read_status(str(tmp_path / "mine"), datetime.now(UTC)).rows)["state"]
            if state.startswith(is_there) or time.monotonic() > deadline:
                return state
            time.sleep(0.05)

    with hold_run(tmp_path / "mine", "mine", beat_s=0.05) as lease:
        lease.tell("2nd of 2, behind other (priority 5); 12 s for 2 x worker of 1 GPU")
        expected = "waiting in line, 2nd of 2, behind other (priority 5); 12 s for 2 x worker of 1 GPU; process "
        assert read_state_until("waiting").startswith(expected)
        lease.tell("")
        assert read_state_until("running").startswith("running: process ")
        (left,) = (tmp_path / "mine").glob("lease-*.json")
        assert "waits_for" not in json.loads(left.read_text())


def test_a_terminal_follows_the_run_and_is_left_when_it_ends(tmp_path: Path):
    sink = make_run(tmp_path / "mine")
    lease = hold_run(tmp_path / "mine", "mine")
    lease.__enter__()
    steps = iter((60, 80))

    def go_on(seconds: float) -> None:
        step = next(steps)
        sink.log_metrics({"train/loss": 3.0, **VALUES}, step)
        if step == 80:
            lease.__exit__(None, None, None)

    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=110, legacy_windows=False)
    show_status(str(tmp_path / "mine"), console=console, pause=go_on)
    drawn = [text.getvalue().index(f"{step} of 100 steps") for step in (40, 60, 80)]
    assert drawn == sorted(drawn)
    assert text.getvalue().rindex("not running") > drawn[-2]


def test_elsewhere_one_table_is_printed_and_no_control_code_of_a_message_reaches_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_run(tmp_path / "mine").log_event("nonfinite", 40, "loss is \x1b[31mnan")
    assert main(["status", str(tmp_path / "mine")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("40 of 100 steps") == 1 and "\x1b" not in printed


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_what_is_no_run_is_said_in_one_line(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / CONFIG_NAME).write_text(content)
    with pytest.raises(ConfigError, match=CONFIG_NAME):
        read_status(str(tmp_path), datetime.now(UTC))


def test_the_file_of_a_kill_is_read_as_far_as_it_goes(tmp_path: Path):
    make_run(tmp_path / "mine")
    with (tmp_path / "mine" / METRICS_NAME).open("a") as handle:
        handle.write(json.dumps({"run": "train", "step": 50, "train/loss": 1.0})[:-4])
    assert "40 of 100" in dict(read_status(str(tmp_path / "mine"), datetime.now(UTC)).rows)["training"]
