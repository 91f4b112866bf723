"""A range of workers: what is refused beforehand, and what is noted of how many there were."""

from __future__ import annotations

import pytest

from layerplan.config.load import validate_config
from layerplan.config.train import TrainConfig, WorkerRange
from layerplan.errors import ConfigError
from layerplan.train.heartbeat import Board
from layerplan.train.place import Beat, Place
from layerplan.train.ray_trainer import describe_workers
from layerplan.train.state import TrainState
from layerplan.train.world import describe_worlds, note_world


def make(**train: object) -> TrainConfig:
    values = {"name": "mine", "model": {"type": "pretrained", "name": "m"}, "train": train}
    return validate_config(values).train


def test_a_range_is_read_and_handed_to_ray_as_it_is() -> None:
    config = make(num_workers={"min": 3, "max": 7, "resize_every": 5}, global_batch_size=8, micro_batch_size=2)
    assert config.num_workers == WorkerRange(min=3, max=7, resize_every=5)
    assert (config.fewest_workers, config.most_workers) == (3, 7)
    assert describe_workers(config) == {"num_workers": (3, 7), "elastic_resize_monitor_interval_s": 5.0}
    assert describe_workers(make(num_workers=4)) == {"num_workers": 4}
    assert make(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"num_workers": {"min": 2, "max": 1}}, "train.num_workers: min=2 must not be above max=1"),
        ({"num_workers": {"min": 0, "max": 1}}, "train.num_workers.min: Input should be greater than or equal to 1 (got 0)"),
        ({"num_workers": {"max": 1}}, "train.num_workers.min: is required"),
        ({"num_workers": {"min": 1, "max": 2, "mx": 3}}, "train.num_workers.mx: unknown key; did you mean 'max'?"),
        ({"num_workers": 0}, "train.num_workers: Input should be greater than or equal to 1 (got 0)"),
        ({"num_workers": "many"}, "train.num_workers: Input should be a valid integer"),
        (
            {"num_workers": {"min": 1, "max": 9}, "global_batch_size": 8},
            "train: num_workers.max=9 must not be above global_batch_size=8: each worker needs a row of a step",
        ),
        (
            {"num_workers": {"min": 2, "max": 4}, "num_replicas": 2},
            "train: num_replicas=2 needs one num_workers that it divides, not a range",
        ),
        (
            {"num_workers": 3, "global_batch_size": 8},
            "train: global_batch_size=8 must be a multiple of num_workers * micro_batch_size",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_line(train: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make(**train)
    (fault,) = refused.value.faults
    assert fault.startswith(said)


def test_every_change_of_the_number_is_noted_once_and_told() -> None:
    state, line = note_world(TrainState(), 2)
    assert (state.worlds, line) == (((0, 2),), "")
    state, line = note_world(state.model_copy(update={"step": 10}), 2)
    assert (state.worlds, line) == (((0, 2),), "")
    state, line = note_world(state, 1)
    assert (state.worlds, line) == (((0, 2), (10, 1)), "1 worker from step 11 on, 2 until then")
    state, line = note_world(state.model_copy(update={"step": 30}), 3)
    assert line == "3 workers from step 31 on, 1 until then"
    assert describe_worlds(state.worlds) == "2 workers, 1 from step 11 on, 3 from step 31 on"
    # ten steps of two, twenty of one, ten of three
    assert state.model_copy(update={"step": 40}).mean_workers == pytest.approx((10 * 2 + 20 * 1 + 10 * 3) / 40)


def test_a_number_that_changed_again_before_a_step_was_taken_leaves_no_trace_of_itself() -> None:
    state = TrainState(step=10, worlds=((0, 2), (10, 1)))
    assert note_world(state, 3)[0].worlds == ((0, 2), (10, 3))
    assert TrainState().mean_workers == 0.0


def test_the_board_forgets_ranks_that_a_smaller_attempt_does_not_have() -> None:
    def beat(rank: int, group: str, began: float) -> Beat:
        return Beat(rank, 1, "host", "node", None, 1, Place(1, "starting"), 1.0, 1.0, group, began=began)

    board = Board()
    for rank in (0, 1):
        board.beat(beat(rank, "first", 100.0 + rank))
    board.beat(beat(0, "second", 200.0))
    board.beat(beat(1, "first", 101.0))
    assert {rank: each.group for rank, each in board.read().items()} == {0: "second"}, "a late beat of the first is old"
