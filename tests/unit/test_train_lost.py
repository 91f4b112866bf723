"""A run that ends because a part of its cluster is gone says that the same command goes on, and from which step."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, LocalRayletDiedError, RayTaskError

from layerplan.entry import run_guarded
from layerplan.train.lost import describe_next, explain_loss, find_loss
from tests.tiny_checkpoint import save


class Failed(Exception):
    """As Ray Train's: carries what each worker failed with."""

    def __init__(self, failures: dict[int, Exception]) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = failures


def test_the_step_is_that_of_the_newest_finished_checkpoint(tmp_path: Path) -> None:
    assert describe_next(tmp_path).endswith("no checkpoint was finished yet, so training begins at step 0")
    for step in (10, 20):
        save(tmp_path / "checkpoints", step)
    (tmp_path / "checkpoints" / "step_00000030").mkdir()
    expected = tmp_path / "checkpoints" / "step_00000020"
    assert describe_next(tmp_path) == f"submit the same command again to continue from step 20 ({expected})"


def test_a_lost_worker_is_told_from_the_faults_of_those_that_waited_for_it(tmp_path: Path) -> None:
    failures: dict[int, Exception] = {0: RuntimeError("Connection closed by peer"), 1: ActorDiedError()}
    explained = explain_loss(Failed(failures), tmp_path, max_failures=3)
    assert str(explained).startswith("training lost rank 1 once more than train.max_failures=3 allows (ActorDiedError:")
    assert explain_loss(Failed({0: RuntimeError("a bug")}), tmp_path, max_failures=3) is None


def test_a_lost_controller_or_raylet_is_a_loss_and_a_fault_of_the_code_is_none(tmp_path: Path) -> None:
    lost = LocalRayletDiedError()
    assert find_loss(lost) is lost
    assert str(explain_loss(lost, tmp_path, 3)).startswith(
        "training lost the controller of Ray Train, or the cluster ("
    )
    assert find_loss(RayTaskError("f", "traceback", ValueError("a bug"))) is None


def test_a_stage_that_loses_an_actor_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def trace() -> None:
        raise ActorDiedError()

    assert run_guarded(trace) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ActorDiedError: ") and "submit the same command again to continue" in line
