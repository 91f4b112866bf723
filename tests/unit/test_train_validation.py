"""The loss on held-out rows before the first step: the base's own, measured once, and nothing trains otherwise for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from layerplan.config.plan import ExplicitPlanConfig
from layerplan.config.train import OptimizerConfig, TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train.loop import run_loop
from layerplan.train.state import TrainState
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_loop import Sink, make_loop, make_rows

VOCAB_SIZE = TINY_QWEN3["vocab_size"]
HELD_OUT = make_rows(1_000, batch=3, vocab_size=VOCAB_SIZE)


def build() -> nn.Module:
    """With dropout, so that a model left in evaluation mode, or noise drawn elsewhere, would train other weights."""
    return build_tiny_qwen3(attention_dropout=0.5)


def train(
    validation: PackedRows | None,
    state: TrainState | None = None,
    sink: Sink | None = None,
    save: Callable[[TrainState], None] = lambda state: None,
    *,
    seed: int = 0,
) -> tuple[dict[str, Tensor], TrainState]:
    model = build()
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
        checkpoint_every_steps=2,
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    rows = lambda step: make_rows(step, batch=2, vocab_size=VOCAB_SIZE)  # noqa: E731
    setup, hooks = make_loop(model, plan, config, rows_of_step=rows, save=save, sink=sink, seed=seed)
    state = run_loop(setup, state or TrainState(), replace(hooks, validation=validation))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, state


def compute_mean_loss(rows: PackedRows) -> float:
    """The untouched base's own loss, by transformers."""
    ids = torch.tensor(rows.input_ids.astype("int64"))
    with torch.no_grad():
        return float(build().eval()(input_ids=ids, labels=ids).loss)


def test_the_base_is_validated_before_the_first_step() -> None:
    sink = Sink()
    _, state = train(HELD_OUT, sink=sink)
    assert state.base_validation_loss == pytest.approx(compute_mean_loss(HELD_OUT), rel=1e-5)
    assert [step for step, values in sink.metrics.items() if "validation/loss" in values] == [0, 2, 4]
    assert sink.metrics[0]["validation/loss"] == state.base_validation_loss
    assert state.validation_loss == sink.metrics[4]["validation/loss"] != state.base_validation_loss


def test_dropout_is_of_the_runs_seed() -> None:
    """Seeds of a sweep that shared it would differ by less than seeds do."""
    first, again, other = (train(None, seed=seed)[0]["model.layers.1.mlp.up_proj.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_looking_first_trains_the_same_bytes() -> None:
    plain, without = train(None)
    looked, state = train(HELD_OUT)
    assert without.base_validation_loss is None and state.base_validation_loss is not None
    assert all(torch.equal(value, looked[name]) for name, value in plain.items())
    assert not all(torch.equal(value, plain[name]) for name, value in build().named_parameters())


@pytest.mark.parametrize("known", [None, 3.5])
def test_a_resumed_run_keeps_what_it_measured_and_does_not_look_again(known: float | None) -> None:
    """None is what a checkpoint of an earlier version has: the trained weights are no base."""
    sink, saved = Sink(), []
    before = TrainState.parse(TrainState(step=2, base_validation_loss=known).model_dump(mode="json"))
    _, state = train(HELD_OUT, before, sink, saved.append)
    assert [item.base_validation_loss for item in saved] == [known]
    assert state.base_validation_loss == known
    assert 0 not in sink.metrics and "validation/loss" not in sink.metrics.get(2, {})


def test_a_result_of_an_earlier_version_has_no_base_loss(tmp_path: Path) -> None:
    import json

    from layerplan.train.request import TrainResult, load_result

    names = ["first_loss", "final_loss", "train_s", "wall_s", "tokens_per_s", "mfu"]
    values = {"final_step": 3, "final_checkpoint": "c", "validation_loss": None, "tokens_seen": 9, "hf_dir": None}
    values |= dict.fromkeys(names, 1.0) | {"skipped_steps": 0, "rollbacks": 0, "proof": {}, "stopped_early": False}
    (tmp_path / "training.json").write_text(json.dumps(values))
    result = load_result(tmp_path)
    assert isinstance(result, TrainResult)
    assert result.base_validation_loss is None
