"""The loop when steps go wrong, and what surrounds a step: recomputation, the lean optimizer, the profiler."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from layerplan.checkpoint.dcp import load_checkpoint, save_checkpoint
from layerplan.config.plan import ExplicitPlanConfig
from layerplan.config.train import OptimizerConfig, StabilityConfig, TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.errors import TrainingError
from layerplan.models.freezing import compute_tensor_hashes
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_plan
from layerplan.train.loop import run_loop
from layerplan.train.state import TrainState
from layerplan.train.step import accumulate_gradients, make_batch
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_loop import Sink, make_loop, make_rows

POISON = 39
"""A token whose embedding row is infinite: a row that has it has no finite loss."""
VALUES = TINY_QWEN3 | {"tie_word_embeddings": False}


def build() -> nn.Module:
    model = build_tiny_qwen3(**VALUES)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.inf
    return model


def plan_for(*layers: int) -> FreezePlan:
    model = ModelIdentity(name="tiny", model_type="qwen3", num_layers=3)
    return make_plan(ExplicitPlanConfig(trainable=list(layers)), model=model, shape=ModelShape.from_hf_config(VALUES))


def config_with(**values: object) -> TrainConfig:
    defaults: dict[str, object] = {
        "max_steps": 8,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "compute_dtype": "float32",
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
        "optimizer": OptimizerConfig(learning_rate=1e-2, eps=1e-5),
    }
    return TrainConfig.model_validate(defaults | values)


def rows_with_poison(*bad: int) -> object:
    return lambda step: make_rows(step, batch=2, vocab_size=POISON, token=POISON if step in bad else None)


def train(config: TrainConfig, rows_of_step: object, folder: Path | None = None) -> tuple[nn.Module, TrainState, Sink]:
    """Runs the loop over layers 0 and 2; with a folder, real checkpoints are saved into it and restored from it."""
    model, sink, newest = build(), Sink(), {}

    def save(state: TrainState) -> None:
        if folder is not None:
            newest["state"], newest["path"] = state, folder / str(state.step)
            save_checkpoint(newest["path"], setup.placed.model, setup.optimizer, None)

    def restore() -> TrainState | None:
        if newest:
            load_checkpoint(newest["path"], setup.placed.model, setup.optimizer)
        return newest.get("state")

    setup, hooks = make_loop(model, plan_for(0, 2), config, rows_of_step=rows_of_step, save=save, sink=sink)  # type: ignore[arg-type]
    state = run_loop(setup, TrainState(), replace(hooks, restore=restore))
    return model, state, sink


@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_a_nonfinite_step_leaves_the_weights_and_the_optimizer_alone(log_every_steps: int) -> None:
    """As if the step's update had not been there, whether its loss is read at once or after the next step was launched."""
    model, state, sink = train(config_with(log_every_steps=log_every_steps), rows_with_poison(4))
    assert (state.step, state.skipped_steps, state.rollbacks) == (8, 1, 0)
    assert sink.events == [("nonfinite", 5)]
    assert sink.metrics[8]["train/skipped_steps"] == 1
    assert all(torch.isfinite(p).all() for name, p in model.named_parameters() if "embed" not in name)
    short, _, _ = train(config_with(max_steps=4, schedule={"type": "constant"}), rows_with_poison())
    until, _, _ = train(config_with(max_steps=5, schedule={"type": "constant"}), rows_with_poison(4))
    assert compute_tensor_hashes(dict(short.named_parameters())) == compute_tensor_hashes(
        dict(until.named_parameters())
    )


def test_spikes_that_are_left_out_use_up_nothing_of_what_is_not_finite() -> None:
    """A rate of a thousandth and a step a thousand times it: what comes after is a spike."""
    stability = StabilityConfig(on_spike="skip", spike_window=5, spike_sigmas=0.01, max_nonfinite=1)
    noisy = config_with(max_steps=16, stability=stability)
    _, state, sink = train(noisy, rows_with_poison(15))
    assert state.skipped_spikes > 0 and state.skipped_steps == 1
    assert sink.metrics[16]["train/skipped_steps"] == state.skipped_spikes + 1


def test_too_many_nonfinite_steps_stop_the_run() -> None:
    with pytest.raises(TrainingError, match=r"step 4: .* is not finite; max_nonfinite=2 steps were left out before it"):
        train(config_with(stability=StabilityConfig(max_nonfinite=2)), rows_with_poison(*range(1, 8)))


def test_a_rollback_ends_with_the_weights_of_a_run_that_never_saw_those_rows(tmp_path: Path) -> None:
    """Bad rows at data step 5; the checkpoint before it is step 4; rows 4 and 5 are passed over."""
    config = config_with(stability=StabilityConfig(on_nonfinite="rollback"))
    model, state, sink = train(config, rows_with_poison(5), tmp_path)
    assert (state.step, state.skipped_steps, state.rollbacks, state.data_offset) == (8, 0, 1, 2)
    assert sink.events == [("nonfinite", 6)]
    good = [0, 1, 2, 3, 6, 7, 8, 9]
    rows = rows_with_poison()
    expected, _, _ = train(config, lambda step: rows(good[step]))  # type: ignore[operator]
    assert compute_tensor_hashes(dict(model.named_parameters())) == compute_tensor_hashes(
        dict(expected.named_parameters())
    )


@pytest.mark.parametrize("log_every_steps", [1, 100])
def test_a_step_launched_before_a_rollback_was_known_is_undone_and_its_rows_train_again(
    tmp_path: Path, log_every_steps: int
) -> None:
    """Bad rows at data step 4, seldom read: step 6 was launched on rows 5 by then. No row is read twice, none is lost."""
    config = config_with(log_every_steps=log_every_steps, stability=StabilityConfig(on_nonfinite="rollback"))
    rows, read = rows_with_poison(4), []

    def note(step: int) -> PackedRows:
        read.append(step)
        return rows(step)  # type: ignore[operator,no-any-return]

    model, state, sink = train(config, note, tmp_path)
    assert (state.step, state.skipped_steps, state.rollbacks, state.data_offset) == (8, 0, 1, 1)
    assert sink.events == [("nonfinite", 5)]
    assert read == list(range(9))
    expected, _, _ = train(config_with(), lambda step: rows(step + (step >= 4)))  # type: ignore[operator]
    assert compute_tensor_hashes(dict(model.named_parameters())) == compute_tensor_hashes(
        dict(expected.named_parameters())
    )


def test_a_run_that_stops_for_a_bad_step_has_saved_nothing_behind_it(tmp_path: Path) -> None:
    """Step 5 is read once step 6 was launched; the newest checkpoint is that of step 4."""
    config = config_with(log_every_steps=100, stability=StabilityConfig(on_nonfinite="stop"))
    with pytest.raises(TrainingError, match=r"step 5: .* is not finite; stopping as train\.stability says"):
        train(config, rows_with_poison(4), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]


def test_a_rollback_into_the_phase_before_keeps_what_was_proved_since(tmp_path: Path) -> None:
    """The newest checkpoint is the last of another phase: its checksum and coverage are not this phase's."""
    config = config_with(stability=StabilityConfig(on_nonfinite="rollback"))
    before = TrainState(step=2, frozen_checksum="float32:other", gradient_coverage={"trainable_with_gradient": 1})
    model, saved = build(), []
    setup, hooks = make_loop(
        model,
        plan_for(0, 2),
        config,
        rows_of_step=rows_with_poison(3),  # type: ignore[arg-type]
        save=saved.append,
    )
    assert setup.frozen is not None
    start = before.model_copy(update={"frozen_checksum": setup.frozen.digest})
    state = run_loop(setup, start, replace(hooks, restore=lambda: before))
    assert state.rollbacks == 1
    assert {item.frozen_checksum for item in saved} == {setup.frozen.digest}
    assert saved[-1].gradient_coverage["trainable_with_gradient"] == 22


def test_rollbacks_have_an_end(tmp_path: Path) -> None:
    config = config_with(stability=StabilityConfig(on_nonfinite="rollback", max_rollbacks=1))
    with pytest.raises(TrainingError, match="max_rollbacks=1 are used up"):
        train(config, rows_with_poison(3, 5, 6, 7), tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()])
def test_out_of_memory_says_what_would_help(error: Exception) -> None:
    model = build()
    advice = "predicted 3.0 GiB of 2.0 GiB; lower train.micro_batch_size"
    rows = rows_with_poison()
    setup, hooks = make_loop(model, plan_for(0), config_with(), rows_of_step=rows, memory_advice=advice)  # type: ignore[arg-type]

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(TrainingError, match=f"step 1: out of memory. {advice}"):
        run_loop(setup, TrainState(), hooks)


def test_the_profiler_writes_a_trace_of_the_chosen_step_alone(tmp_path: Path) -> None:
    rows = rows_with_poison()
    config = config_with(max_steps=3, profile_step=2)
    setup, hooks = make_loop(build(), plan_for(2), config, rows_of_step=rows, profile_dir=tmp_path)  # type: ignore[arg-type]
    run_loop(setup, TrainState(), hooks)
    (trace,) = tmp_path.iterdir()
    assert trace.name == "step_00000002.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names


def gradients_and_saved_bytes(placement: Placement) -> tuple[dict[str, Tensor], int]:
    model, saved = build(), 0
    setup, _ = make_loop(
        model,
        plan_for(0),
        config_with(),
        rows_of_step=rows_with_poison(),  # type: ignore[arg-type]
        placement=placement,
    )

    def pack(value: Tensor) -> Tensor:
        nonlocal saved
        saved += 0 if isinstance(value, nn.Parameter) else value.untyped_storage().nbytes()
        return value

    rows: PackedRows = make_rows(0, batch=2, vocab_size=POISON)
    batch = make_batch(rows, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        accumulate_gradients(setup.placed.model, [batch], 1.0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, saved


def test_recomputed_layers_give_the_same_gradients_and_store_less() -> None:
    plain, everything = gradients_and_saved_bytes(Placement("replicate", "replicate"))
    recomputed, less = gradients_and_saved_bytes(
        Placement("replicate", "replicate", checkpointed_layers=frozenset({0, 1, 2}))
    )
    assert plain.keys() == recomputed.keys() and len(plain) == 11
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    assert less < 0.4 * everything


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lean_optimizer_is_the_librarys_over_float32_masters(dtype: str) -> None:
    """Adafactor on the gradients our model has, fed by hand into torch's own over float32 copies."""
    config = config_with(
        compute_dtype=dtype,
        optimizer=OptimizerConfig(type="adafactor", learning_rate=1e-2, weight_decay=0.0, max_grad_norm=1e9),
        schedule={"type": "constant", "warmup_ratio": 0.0},
    )
    rows = rows_with_poison()
    model = build()
    setup, hooks = make_loop(model, plan_for(2), config, rows_of_step=rows)  # type: ignore[arg-type]
    masters = {
        name: nn.Parameter(p.detach().float().clone()) for name, p in build().named_parameters() if ".layers.2." in name
    }
    theirs = torch.optim.Adafactor(masters.values(), lr=1e-2, weight_decay=0.0)
    step = setup.optimizer.step

    def record(*args: object, **kwargs: object) -> None:
        for name, p in model.named_parameters():
            if name in masters:
                masters[name].grad = p.grad.float()
        theirs.step()
        step(*args, **kwargs)

    setup.optimizer.step = record  # type: ignore[method-assign]
    run_loop(setup, TrainState(), hooks, stop_step=3)
    for name, parameter in model.named_parameters():
        if name in masters:
            assert parameter.dtype == getattr(torch, dtype)
            assert torch.equal(parameter, masters[name].to(parameter.dtype)), name
