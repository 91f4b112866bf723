"""A short seed of `make chaos`, and that it would see a loss."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.chaos.files import damage_files, fill_disk, try_checkpoint
from tests.chaos.outcomes import Outcome, render_table
from tests.chaos.processes import CHOICES, draw_faults
from tests.chaos.report import Report, add_up
from tests.chaos.victims import hurt
from tests.tiny_checkpoint import RUN_ID, load, make_old, save


def test_damaged_files_change_no_value_that_is_used_and_every_message_names_the_file(tmp_path: Path) -> None:
    outcomes = damage_files(tmp_path, random.Random(3), 40)
    assert [outcome for outcome in outcomes if outcome.lost] == []
    assert len(outcomes) == 80 and sum(bool(outcome.said) for outcome in outcomes) > 60, render_table(outcomes)


def test_a_full_disk_is_named_and_the_checkpoint_before_it_is_used(tmp_path: Path) -> None:
    outcome = fill_disk(tmp_path / "disk")
    if outcome.said.startswith("skipped"):
        pytest.skip(outcome.said)
    assert outcome.lost == "", outcome
    assert str(tmp_path / "disk" / "step_00000020") in outcome.said and "No space left on device" in outcome.said


def test_a_storm_sees_what_no_seal_guards_and_weights_that_are_others(tmp_path: Path) -> None:
    """Damaged checkpoints from before there were seals are loaded, or not, only when it is too late."""
    folder = tmp_path / "checkpoints"
    wanted = {path.name: load(path) for path in (save(folder, 10), save(folder, 20))}
    (folder / "run_id").write_text(RUN_ID)
    swapped = dict(zip(wanted, reversed(wanted.values())))
    assert try_checkpoint(folder, swapped, random.Random(0)).lost == "other weights were used"
    for name in wanted:
        make_old(folder / name)
    lost = [try_checkpoint(folder, wanted, random.Random(seed)).lost for seed in range(40)]
    assert any("cannot be loaded" in each for each in lost), lost


def test_a_seed_draws_the_same_faults_and_each_kind_before_any_twice() -> None:
    drawn = [draw_faults(random.Random(5), len(CHOICES), CHOICES) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert {(fault.victim, fault.signal) for fault in drawn[0]} == set(CHOICES)
    assert [fault.at for fault in drawn[0]] == sorted(fault.at for fault in drawn[0])


def test_the_table_has_a_row_for_each_kind_with_what_was_lost() -> None:
    outcomes = [Outcome("bit", "a | b"), Outcome("bit", ""), Outcome("cut", "", "weights")]
    outcomes += [Outcome("kill", "skipped", met=False), Outcome("kill", "again")]
    assert render_table(outcomes).splitlines()[2:] == [
        "| bit | 2 | 0 | a \\| b (1 without effect) | nothing |",
        "| cut | 1 | 0 | nothing: no value changed | weights |",
        "| kill | 1 | 1 | again | nothing |",
    ]


def test_a_kill_counts_only_where_a_process_lived() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    victim = psutil.Process(process.pid)
    assert hurt(victim, signal.SIGSTOP) and victim.status() == psutil.STATUS_STOPPED
    assert hurt(victim, signal.SIGKILL)
    assert not hurt(victim, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_seeds_are_added_up_and_what_missed_is_no_kill(tmp_path: Path) -> None:
    machine = {"date": "2026-11-26", "commit": "abc", "cpu": "two of them", "cores": 2}
    first = [Outcome("worker: SIGKILL", "went on"), Outcome("head: SIGKILL", "skipped", met=False)]
    second = [
        Outcome("head: SIGKILL", "ended"),
        Outcome("driver: SIGTERM", "stopped"),
        Outcome("a whole storm", "", "weights"),
    ]
    Report(1, machine, first, [(18, 11)], 60).save(tmp_path / "1.json")
    Report(2, machine, second, [(30, 12)], 61).save(tmp_path / "2.json")
    page = add_up([Report.load(tmp_path / name) for name in ("1.json", "2.json")])
    assert (
        "2 processes that lived were killed in 1 storms of 2 seeds on two of them, 2 cores.\n0 of 1 ended with" in page
    )
    assert "2 times training went on by itself after a worker was lost, within 30 s at most, 18 s beyond" in page
    assert "| head: SIGKILL | 1 | 1 | ended | nothing |" in page
    assert "| 2 | 2026-11-26 | abc | 1 | 0 | 1 | 1 | 61 |" in page
