"""What SIGTERM and Ctrl-C do while a run trains."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerplan.run_folder import STOP_REQUEST
from layerplan.sweep.tuner import ending_trials_on_ctrl_c
from layerplan.train.trainer import stopping_on_signals


@pytest.fixture(autouse=True)
def _usual_ctrl_c() -> Iterator[None]:
    """Python's own handler, which a shell that starts tests in the background keeps away."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_asks_for_a_checkpoint_and_is_raised_again_when_training_has_ended(tmp_path: Path) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), stopping_on_signals(tmp_path):
        press_ctrl_c()
        assert (tmp_path / STOP_REQUEST).exists()
        reached = True
    assert reached and not (tmp_path / STOP_REQUEST).exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_pressed_twice_does_not_wait_for_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stopping_on_signals(tmp_path):
        press_ctrl_c()
        press_ctrl_c()
        pytest.fail("training goes on")


def test_a_ctrl_c_that_is_ignored_stays_so(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping_on_signals(tmp_path):
        press_ctrl_c()
        assert not (tmp_path / STOP_REQUEST).exists()


def test_ctrl_c_ends_a_sweeps_trials_and_is_raised_when_they_have_ended() -> None:
    """Ray Tune takes SIGUSR1 for the wish to end, while it runs; before that there is nothing to end."""
    ended: list[int] = []
    with pytest.raises(KeyboardInterrupt), ending_trials_on_ctrl_c():
        press_ctrl_c()
        pytest.fail("nothing runs that could be ended")
    previous = signal.signal(signal.SIGUSR1, lambda signum, frame: ended.append(signum))
    try:
        with pytest.raises(KeyboardInterrupt), ending_trials_on_ctrl_c():
            press_ctrl_c()
            assert ended == [signal.SIGUSR1]
        with pytest.raises(KeyboardInterrupt), ending_trials_on_ctrl_c():
            press_ctrl_c()
            press_ctrl_c()
            pytest.fail("the sweep goes on")
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
