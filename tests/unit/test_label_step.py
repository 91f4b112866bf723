"""Prompts with a label, each trained from its own layer: against PyTorch's own counts and a loop written out by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layerplan.config.finetune import LabelLoss
from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.errors import TrainingError
from layerplan.models.freezing import apply_plan
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.start_cost import compute_saving
from layerplan.train.label_step import LabelLossModel, make_label_batches
from layerplan.train.loop import run_loop
from layerplan.train.request import LabelOptions
from layerplan.train.state import TrainState
from layerplan.train.step import accumulate_gradients
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_labels import PLAIN, draw, plan_all, train_plainly
from tests.tiny_loop import make_loop

CPU = torch.device("cpu")
LOSSES: tuple[LabelLoss, ...] = ("vocabulary", "semantic_ce", "semantic_cosine")


def build(num_layers: int, options: LabelOptions | None = None) -> LabelLossModel:
    model = build_tiny_qwen3(num_hidden_layers=num_layers, attn_implementation="eager")
    apply_plan(model, plan_all(num_layers))
    return LabelLossModel(model.train(), options=options or LabelOptions())


def layers_with_gradient(model: LabelLossModel) -> set[int]:
    names = [name for name, value in model.named_parameters() if value.grad is not None]
    assert all(".layers." in name for name in names), "head, norm and embeddings are frozen"
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


def count_backward_flops(model: LabelLossModel, rows: PackedRows) -> int:
    (batch,) = make_label_batches(rows, len(rows), CPU)
    loss = model(batch)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def test_half_saves_what_the_paper_says_by_pytorchs_own_count() -> None:
    """One row per start layer, as `half` gives: depth is (L - 1) / 2L, and FLOPs are within half a point of it."""
    assert [round((num_layers - 1) / (2 * num_layers), 3) for num_layers in (32, 30)] == [0.484, 0.483]
    num_layers, share = 32, 0.484
    rows = draw([0])
    model = build(num_layers)
    spent = [count_backward_flops(model, draw([start])) for start in range(num_layers)]
    counted = 1 - sum(spent) / num_layers / spent[0]
    plan, shape = plan_all(num_layers), ModelShape.from_hf_config(TINY_QWEN3 | {"num_hidden_layers": num_layers})
    saving = compute_saving(list(range(num_layers)), plan, shape, seq_len=int((rows.document_ids >= 0).sum()) - 1)
    assert round(saving.depth, 3) == share
    assert counted == pytest.approx(saving.depth, abs=0.005)
    assert saving.flops == pytest.approx(counted, abs=0.005)


def test_lift_reaches_as_deep_and_saves_more_flops() -> None:
    num_layers = 12
    model = build(num_layers, LabelOptions(trains_alone=True))
    spent = [count_backward_flops(model, draw([start])) for start in range(num_layers)]
    full = count_backward_flops(build(num_layers), draw([0]))
    plan, shape = plan_all(num_layers), ModelShape.from_hf_config(TINY_QWEN3 | {"num_hidden_layers": num_layers})
    saving = compute_saving(list(range(num_layers)), plan, shape, seq_len=8, trains_alone=True)
    assert saving.depth == pytest.approx(11 / 24)
    assert saving.flops > saving.depth + 0.15
    assert saving.flops == pytest.approx(1 - sum(spent) / num_layers / full, abs=0.01)


def test_below_its_start_layer_a_micro_batch_leaves_no_gradient_and_saves_nothing() -> None:
    num_layers, saved = 5, []
    for start in range(num_layers):
        model, kept = build(num_layers), list[int]()
        (batch,) = make_label_batches(draw([start]), 1, CPU)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each, kept=kept: kept.append(each.numel()) or each, lambda each: each
        ):
            loss = model(batch)
        loss.backward()
        assert layers_with_gradient(model) == set(range(start, num_layers))
        saved.append(len(kept))
    steps = np.diff(saved)
    # the layer that is entered without a gradient saves a little less than one that carries one on
    assert (steps[1:] == steps[1]).all() and steps[0] == steps[1] < 0
    assert saved[-1] < -2 * steps[0]


def test_lift_moves_one_layer_and_leaves_every_weight_as_it_was_asked() -> None:
    model = build(4, LabelOptions(trains_alone=True))
    accumulate_gradients(model, make_label_batches(draw([1, 1, 3]), 2, CPU), 1.0)
    assert layers_with_gradient(model) == {1, 3}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        name for name, value in model.named_parameters() if ".layers." in name
    }
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("trains_alone", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_equal_those_of_a_plain_loop(loss: LabelLoss, trains_alone: bool) -> None:
    """Four steps of mixed start layers: AdamW of PyTorch over one row at a time, its layers frozen by hand."""
    steps = [[0, 0, 1, 3], [1, 2, 2, 2], [2, 3, 3, 3], [3, 3, 3, 0]]
    config = PLAIN.model_copy(update={"max_steps": len(steps)})
    options = LabelOptions(loss, trains_alone)
    model = build_tiny_qwen3(num_hidden_layers=4)
    setup, hooks = make_loop(
        model,
        plan_all(4),
        config,
        rows_of_step=lambda step: draw(steps[step], seed=step),
        loss_model=partial(LabelLossModel, options=options),
    )
    state = run_loop(setup, TrainState(), hooks)
    plain = build_tiny_qwen3(num_hidden_layers=4)
    losses = train_plainly(plain, [draw(starts, seed=step) for step, starts in enumerate(steps)], options)
    assert state.coverage_checks == 4 and state.first_loss == pytest.approx(losses[0], abs=1e-5)
    expected = dict(plain.named_parameters())
    moved = max(float((value - expected[name]).abs().max()) for name, value in model.named_parameters())
    assert moved < 1e-6
    start = dict(build_tiny_qwen3(num_hidden_layers=4).named_parameters())
    assert max(float((value - start[name]).abs().max()) for name, value in model.named_parameters()) > 5e-4
    assert all(torch.equal(value, start[name]) == (".layers." not in name) for name, value in model.named_parameters())


def test_gradients_of_another_layer_than_the_rows_ask_for_end_the_run() -> None:
    """The proof is of each step's own start layers, not of the plan as a whole."""
    model = build_tiny_qwen3(num_hidden_layers=3)
    config = TrainConfig(max_steps=2, global_batch_size=2, micro_batch_size=2, compute_dtype="float32")

    class Forgetful(LabelLossModel):
        def make_batches(self, rows: PackedRows, size: int, device: torch.device) -> list:
            return make_label_batches(draw([0, 0]), size, device)

    setup, hooks = make_loop(
        model,
        plan_all(3),
        config,
        rows_of_step=lambda step: draw([step, step]),
        loss_model=partial(Forgetful, options=LabelOptions()),
    )
    with pytest.raises(TrainingError, match=r"11 frozen parameters have one \(model.layers.0"):
        run_loop(setup, TrainState(), hooks)


def test_a_semantic_loss_of_a_head_that_trains_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"finetune\.loss=semantic_ce: the head trains"):
        LabelLossModel(build_tiny_qwen3(), options=LabelOptions("semantic_ce"))
