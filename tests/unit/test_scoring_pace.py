"""Scoring uses the cores there are and says how far it is; the compute dtype follows what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerplan.config.train import TrainConfig
from layerplan.models.cores import count_threads, use_cores
from layerplan.progress import ProgressLines
from layerplan.train.compute_dtype import MeasuredDtype, measure_dtypes, settle_dtype


@pytest.mark.parametrize(
    ("asked", "engines", "cores", "threads"), [(None, 1, 2, 2), (None, 2, 16, 8), (None, 4, 2, 1), (1, 1, 16, 1)]
)
def test_an_engine_gets_its_share_of_the_cores(asked: int | None, engines: int, cores: int, threads: int) -> None:
    assert count_threads(asked, engines, cores) == threads


def test_an_engine_computes_on_as_many_threads_as_it_was_given() -> None:
    before = torch.get_num_threads()
    try:
        use_cores(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_progress_is_said_once_a_minute_with_the_time_that_is_left() -> None:
    now, lines = [0.0], []
    progress = ProgressLines("prompts answered", 128, lines.append, done=28, clock=lambda: now[0])
    for now[0], count in ((24.0, 10), (66.0, 10), (90.0, 10), (132.0, 30), (240.0, 40)):
        progress.add(count)
    # after the first 10: 10 took 42 s, 80 more take 336 s; then 50 took 108 s, 40 more take 86.4 s; the end needs no line
    assert lines == [
        "48 of 128 prompts answered, about 336 s to go",
        "88 of 128 prompts answered, about 86 s to go",
    ]


def test_how_long_the_rest_takes_is_said_from_the_second_result_on_and_without_the_load() -> None:
    """A model that takes an hour to load, and then 20 s for each of 100 probes."""
    now, lines = [0.0], []
    progress = ProgressLines("probes measured", 100, lines.append, clock=lambda: now[0])
    for result in range(7):
        now[0] = 3600 + 20 * result
        progress.add(1)
    assert lines == [
        "1 of 100 probes measured",
        "4 of 100 probes measured, about 1920 s to go",
        "7 of 100 probes measured, about 1860 s to go",
    ]


@pytest.mark.parametrize(
    ("float32", "bfloat16", "dtype"), [(50.0, 140.0, "bfloat16"), (50.0, 0.5, "float32"), (50.0, 55.0, "float32")]
)
def test_bfloat16_has_to_be_a_fifth_faster(float32: float, bfloat16: float, dtype: str) -> None:
    assert MeasuredDtype(float32, bfloat16).dtype == dtype
    assert str(MeasuredDtype(float32, bfloat16)).startswith(f"compute dtype {dtype}: ")


def test_the_measurement_gives_two_rates() -> None:
    measured = measure_dtypes()
    assert measured.float32_gflops > 0 and measured.bfloat16_gflops > 0


def test_a_run_keeps_the_dtype_it_began_with(tmp_path: Path) -> None:
    config, path = TrainConfig(compute_dtype="auto"), tmp_path / "compute_dtype.json"
    MeasuredDtype(50.0, 300.0).save(path)
    settled, measured = settle_dtype(config, path)
    assert (settled.compute_dtype, measured) == ("bfloat16", MeasuredDtype(50.0, 300.0))
    assert settle_dtype(TrainConfig(compute_dtype="auto", use_gpu=True), path)[0].compute_dtype == "bfloat16"
    assert settle_dtype(TrainConfig(compute_dtype="float32"), path) == (TrainConfig(compute_dtype="float32"), None)
    assert config.assume_dtype().compute_dtype == "float32", "a dry run measures nothing"
