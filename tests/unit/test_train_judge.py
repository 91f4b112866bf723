"""Losses row by row: against transformers' own, at the steps that want them, and a base that is read once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerplan.config.plan import ExplicitPlanConfig
from layerplan.config.train import OptimizerConfig, TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train.held_out_rows import load_losses, save_texts
from layerplan.train.judge import VALIDATION, HeldOutJudge, read_texts
from layerplan.train.loop import run_loop
from layerplan.train.request import Judging
from layerplan.train.state import TrainState
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_loop import make_loop, make_rows

VOCAB_SIZE = TINY_QWEN3["vocab_size"]
OWN, ENGLISH, PYTHON = (make_rows(step, batch=5, vocab_size=VOCAB_SIZE) for step in (1_000, 2_000, 3_000))


def train(folder: Path, told: list[dict[str, Any]], *, metric: str = VALIDATION) -> tuple[nn.Module, TrainState]:
    model = build_tiny_qwen3()
    identity = ModelIdentity(name="tiny", model_type="qwen3", num_layers=3)
    plan = make_plan(
        ExplicitPlanConfig(trainable=[1, 2], tied="frozen"), model=identity, shape=ModelShape.from_hf_config(TINY_QWEN3)
    )
    config = TrainConfig(
        max_steps=4,
        global_batch_size=2,
        micro_batch_size=2,
        compute_dtype="float32",
        validate_every_steps=2,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    rows = lambda step: make_rows(step, batch=2, vocab_size=VOCAB_SIZE)  # noqa: E731
    setup, hooks = make_loop(model, plan, config, rows_of_step=rows)
    save_texts(folder / "texts.npz", {"english": ENGLISH, "python": PYTHON})
    judging = Judging(metric, folder / "texts.npz", folder / "base.json", folder / "result.json")
    texts = read_texts(judging, OWN)
    judge = HeldOutJudge(setup.placed.model, texts, judging, 4, torch.device("cpu"), 0, 1, told.append)
    return model, run_loop(setup, TrainState(), replace(hooks, validation=OWN, measure=judge))


def compute_losses(model: nn.Module, rows: PackedRows) -> list[float]:
    """Of each row by itself, by transformers, nats in all."""
    ids = torch.tensor(rows.input_ids.astype("int64"))
    with torch.no_grad():
        return [float(model.eval()(input_ids=row[None], labels=row[None]).loss) * (len(row) - 1) for row in ids]


def test_base_and_result_are_measured_row_by_row(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    model, state = train(tmp_path, told)
    for path, measured in (("base.json", build_tiny_qwen3()), ("result.json", model)):
        losses = load_losses(tmp_path / path)
        assert losses.keys() == {VALIDATION, "english", "python"}
        for name, rows in ((VALIDATION, OWN), ("english", ENGLISH), ("python", PYTHON)):
            np.testing.assert_allclose(losses[name].nats, compute_losses(measured, rows), rtol=1e-4)
            assert losses[name].labels.tolist() == [rows.input_ids.shape[1] - 1] * 5
    assert state.base_validation_loss == pytest.approx(sum(compute_losses(build_tiny_qwen3(), OWN)) / 55, rel=1e-4)
    assert [each["step"] for each in told] == [2, 4]
    assert told[0].keys() == {"step", "train_loss", VALIDATION}, "on the way what is compared, and no more"
    assert told[1].keys() == told[0].keys() | {"english", "python"}
    assert told[1][VALIDATION] == state.validation_loss == load_losses(tmp_path / "result.json")[VALIDATION].mean


def test_a_text_that_is_to_be_low_is_measured_on_the_way(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    train(tmp_path, told, metric="english")
    assert told[0].keys() == {"step", "train_loss", VALIDATION, "english"}


def test_the_base_is_measured_by_the_first_training_alone(tmp_path: Path) -> None:
    _, first = train(tmp_path, [])
    written = (tmp_path / "base.json").read_text(encoding="utf-8").replace("\n", "")
    (tmp_path / "base.json").write_text(written, encoding="utf-8")
    _, second = train(tmp_path, [])
    assert second.base_validation_loss == first.base_validation_loss
    assert (tmp_path / "base.json").read_text(encoding="utf-8") == written, "read, not measured again"
    (tmp_path / "base.json").write_text(written.replace('"rows_sha256": "', '"rows_sha256": "other '), encoding="utf-8")
    train(tmp_path, [])
    assert "other" not in (tmp_path / "base.json").read_text(encoding="utf-8"), "of other rows, so measured anew"
