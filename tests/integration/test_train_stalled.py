"""A worker that is stopped, a finished run that is given more steps, and a run that may lose no worker and loses one.

The file is also the program the test starts: `python test_train_stalled.py FOLDER` does all three on a cluster of its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.ray_script import run_script
from tests.tiny_store import make_inputs

STOPPED_AT = 3
KILLED_AT = 5


@pytest.mark.long
def test_a_stopped_worker_is_named_and_replaced_and_a_finished_run_takes_more_steps(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    done = run_script(__file__, tmp_path, timeout_s=800)
    assert done.returncode == 1, done.stdout[-5000:]
    run = tmp_path / "run"

    said = [line for line in done.stdout.splitlines() if line.startswith("[watch] no progress")]
    assert len(said) == 1, done.stdout[-5000:]
    assert re.search(r"rank 0 \(pid \d+ on .*\) is the slowest, its process is stopped and says nothing", said[0]), said
    (folder,) = (run / "stalls").iterdir()
    assert str(folder) in said[0] and "stacks of 1 of 2 ranks" in said[0], said
    assert "layerplan/train/loop.py" in (folder / "rank_1.txt").read_text(), "where the other rank waits"
    assert "did not answer: its process is stopped" in (folder / "rank_0.txt").read_text()
    (recovered,) = re.findall(
        r"\[watch\] training goes on at step \d+, (\d+) s after .*, (\d+) s of which", done.stdout
    )
    assert int(recovered[0]) - int(recovered[1]) < 60, "seconds beyond the start of a process"

    assert "train.max_steps is 10, it was 6" in done.stdout
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("run", "straight")]
    assert [json.loads(line)["step"] for line in ledgers[0].splitlines()] == list(range(1, 11))
    assert ledgers[0] == ledgers[1]
    results = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("run", "straight")]
    assert results[0]["hf_dir"] == results[1]["hf_dir"] == "hf/step_00000010"
    weights = [(tmp_path / name / "hf/step_00000010/model.safetensors").read_bytes() for name in ("run", "straight")]
    assert weights[0] == weights[1], "a constant rate knows no horizon"
    assert (run / "hf/step_00000006/model.safetensors").read_bytes() != weights[0]

    error = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert error.startswith("error: training lost rank 0 once more than train.max_failures=0 allows"), error
    assert "submit the same command again to continue from step 4" in error, error


@dataclass
class AccidentSink:
    """Stops or kills rank 0, once."""

    run: Path
    at: int
    signal: int

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        marker = self.run / "accident.done"
        if "train/loss" not in metrics:
            return
        if marker.exists():
            time.sleep(1.5)  # a beat comes every two seconds, and these steps take milliseconds
        elif step == self.at:
            self.wait_for_seal(step - 1 - (step - 1) % 2)
            marker.touch()
            os.kill(os.getpid(), self.signal)

    def wait_for_seal(self, step: int) -> None:
        """Checkpoints are sealed in the background."""
        while not (self.run / "checkpoints" / f"step_{step:08d}" / "seal.json").exists():
            time.sleep(0.1)

    def log_event(self, name: str, step: int, message: str) -> None: ...

    def close(self) -> None: ...


def main() -> None:
    import ray
    from test_train_resume import make_request

    from layerplan.config.cluster import ClusterConfig
    from layerplan.config.train import ScheduleConfig
    from layerplan.ray_session import connect
    from layerplan.train.trainer import run_training

    folder = Path(sys.argv[1])

    def request(name: str, **update: Any) -> Any:
        made = make_request(folder, name)
        constant = ScheduleConfig(type="constant", warmup_ratio=0.0)
        config = made.config.model_copy(update={"schedule": constant, "stall_timeout": 15.0, **update})
        return replace(made, config=config, sink_factory=None)

    def hurt(made: Any, at: int, number: int) -> Any:
        return replace(made, sink_factory=lambda start: AccidentSink(made.run_dir, at, number))

    with tempfile.TemporaryDirectory(prefix="lpt", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        os.environ["RAY_TMPDIR"] = ray_folder
        connect(ClusterConfig(num_cpus=4), min_cpus=1)
        first = run_training(hurt(request("run", max_steps=6), STOPPED_AT, signal.SIGSTOP))
        assert first.final_step == 6
        assert run_training(request("run", max_steps=10)).final_step == 10
        run_training(request("straight", max_steps=10))
        try:
            lost = request("lost", max_steps=10, max_failures=0, num_workers=1)
            run_training(hurt(lost, KILLED_AT, signal.SIGKILL))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    from layerplan.entry import run_guarded

    sys.exit(run_guarded(main))
