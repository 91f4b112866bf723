"""Rival measurements on Ray's actor pool: any number of processes gives the same, and what is measured is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.config.measure import MEASUREMENTS, MeasureConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import CorpusError
from layerplan.measure.pool import measure_model
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_measurement import LayerMeasurement
from layerplan.run_folder import MEASURED_NAME
from tests.tiny_corpus import make_text, write_jsonl

CONFIG = MeasureConfig(num_rows=3, seq_len=32, pilot_rows=1, lens_positions=64, num_cpus_per_actor=0.5)
TRAIN = TrainConfig(max_steps=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """Forty short documents."""
    path = tmp_path_factory.mktemp("text") / "raw.jsonl"
    write_jsonl(path, *({"id": str(number), "text": make_text(number)} for number in range(40)))
    return CorpusConfig(sources=[SourceConfig(path=str(path))])


def measure(seed_model: str, corpus: CorpusConfig, out_dir: Path, config: MeasureConfig) -> list[LayerMeasurement]:
    return measure_model(ModelRef(seed_model), MEASUREMENTS, config=config, train=TRAIN, corpus=corpus, out_dir=out_dir)


def test_all_measurements_are_the_same_from_two_processes_and_after_an_interruption(
    ray_local: None, seed_model: str, corpus: CorpusConfig, tmp_path: Path
):
    whole = measure(seed_model, corpus, tmp_path / "one", CONFIG)
    assert [each.name for each in whole] == list(MEASUREMENTS)
    assert [len(each.repeats) for each in whole] == [7, 3, 3, 3, 4, 3]
    ledger = tmp_path / "two" / MEASURED_NAME
    ledger.parent.mkdir()
    lines = (tmp_path / "one" / MEASURED_NAME).read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])  # a kill in the middle of a line
    again = measure(seed_model, corpus, ledger.parent, CONFIG.model_copy(update={"num_actors": 2}))
    assert [each.sha256 for each in again] == [each.sha256 for each in whole]
    keys = [json.loads(line)["key"] for line in ledger.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len(lines)


def test_too_little_text_is_told_before_anything_is_measured(seed_model: str, corpus: CorpusConfig, tmp_path: Path):
    with pytest.raises(CorpusError, match=r"corpus.sources.0.path=.* rows of 512 tokens, a measurement needs 404"):
        measure(seed_model, corpus, tmp_path, CONFIG.model_copy(update={"num_rows": 400, "seq_len": 512}))
