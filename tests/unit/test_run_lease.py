"""One writer per run folder: who holds it is told, and one that is gone is followed at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from layerplan.errors import ConfigError, RunBusyError
from layerplan.pipeline.run_lease import hold_run

ROOT = Path(__file__).resolve().parents[2]
IMPORT = "from layerplan.pipeline.run_lease import hold_run"
HOLD = f"import sys\n{IMPORT}\nwith hold_run(sys.argv[1], 'r'):\n print('held', flush=True)\n input()"


def silent(line: str) -> None:
    pass


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_JOB_ID": "raysubmit_7"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def leases(folder: Path) -> list[Path]:
    return sorted(folder.glob("*lease*"))


def move_to_another_machine(lease: Path) -> None:
    lease.write_text(json.dumps(json.loads(lease.read_text()) | {"machine": "another"}))


def test_the_second_is_told_who_runs_it_and_the_end_makes_way(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(
            RunBusyError, match=rf"run 'r' is being run by process {holder.pid} on .*job raysubmit_7"
        ) as told,
        hold_run(tmp_path, "r"),
    ):
        pass
    assert told.value.exit_code == 1
    assert len(leases(tmp_path)) == 1
    holder.communicate("\n", timeout=20)
    assert leases(tmp_path) == []
    with hold_run(tmp_path, "r"):
        assert len(leases(tmp_path)) == 1


def test_a_killed_holder_is_followed_at_once_and_a_stopped_one_is_not(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    """A stopped process may go on and write; a killed one cannot, also while nobody has read its exit status."""
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(RunBusyError), hold_run(tmp_path, "r"):
        pass
    holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{holder.pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{holder.pid}/stat").read_text().split(") ")[1].startswith("Z"):
            break
    started = time.monotonic()
    with hold_run(tmp_path, "r", report=pytest.fail):
        assert len(leases(tmp_path)) == 1
    assert time.monotonic() - started < 1.0


def test_a_later_process_with_the_same_number_holds_nothing(tmp_path: Path) -> None:
    with hold_run(tmp_path, "r"):
        left = leases(tmp_path)[0].read_text()
    before = json.loads(left) | {"process_started": json.loads(left)["process_started"] - 3600}
    (tmp_path / f"lease-{before['owner']}.json").write_text(json.dumps(before))
    with hold_run(tmp_path, "r"):
        pass


def test_another_machine_that_shows_no_life_is_followed_after_the_stated_time(tmp_path: Path) -> None:
    with hold_run(tmp_path, "r"):
        left = leases(tmp_path)[0]
        text = left.read_text()
    left.write_text(text)
    move_to_another_machine(left)
    lines: list[str] = []
    started = time.monotonic()
    with hold_run(tmp_path, "r", stale_s=0.5, report=lines.append):
        assert 0.5 <= time.monotonic() - started < 3
        assert not left.exists()
    assert len(lines) == 1 and "waiting up to 0.5 s for a sign of life" in lines[0]


def test_another_machine_that_shows_life_is_not(tmp_path: Path) -> None:
    with hold_run(tmp_path, "r"):
        left = leases(tmp_path)[0]
        text = left.read_text()
    left.write_text(text)
    move_to_another_machine(left)
    values = json.loads(left.read_text())
    beat = threading.Timer(0.3, lambda: left.write_text(json.dumps(values | {"beat": "later"})))
    beat.start()
    started = time.monotonic()
    with pytest.raises(RunBusyError, match="is being run by"), hold_run(tmp_path, "r", stale_s=8, report=silent):
        pass
    assert time.monotonic() - started < 4, "the first sign of life is enough"


def test_a_holder_whose_lease_was_taken_over_stops(tmp_path: Path) -> None:
    with (
        pytest.raises(RunBusyError, match="lease was removed by another submission"),
        hold_run(tmp_path, "r", beat_s=0.05),
    ):
        leases(tmp_path)[0].unlink()
        time.sleep(20)
    assert leases(tmp_path) == []


def test_of_many_that_come_at_once_never_two_hold_it(tmp_path: Path) -> None:
    inside, most, held = 0, 0, 0
    lock = threading.Lock()

    def submit(number: int) -> None:
        nonlocal inside, most, held
        try:
            with hold_run(tmp_path, "r"):
                with lock:
                    inside += 1
                    most, held = max(most, inside), held + 1
                time.sleep(0.02)
                with lock:
                    inside -= 1
        except RunBusyError:
            return

    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(submit, range(8)))
    assert most == 1
    assert held >= 10, "one of each eight gets it"
    assert leases(tmp_path) == []


def test_a_lease_that_cannot_be_read_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lease-x.json").write_text("{")
    with pytest.raises(RunBusyError, match=r"lease-x\.json: cannot be read.*remove it"), hold_run(tmp_path, "r"):
        pass


def test_a_folder_that_cannot_be_written_is_a_fault_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"storage_path: .*cannot be written"), hold_run(tmp_path / "file" / "r", "r"):
        pass
