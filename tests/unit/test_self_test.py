"""The model is asked how its loss is computed: what it answers is held against transformers' own loss of each document alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.errors import CheckpointError, ModelError
from layerplan.models.head import find_head_form
from layerplan.plan.loss_recipe import HeadForm, LossRecipe
from layerplan.train import self_test, step
from layerplan.train.loss_proof import prove_loss
from layerplan.train.self_test import ask_model, confirm_recipe, set_attention
from layerplan.train.state import TrainState
from layerplan.train.step import LossModel, make_batches
from tests.family_oracle import compute_own_loss, use_eager
from tests.small_families import OTHERS, WINDOWED, build_family

CPU = torch.device("cpu")
LENGTHS = (20, 30, 14)


def pack(documents: list[torch.Tensor], seq_len: int = 72) -> PackedRows:
    """One row, padded at its end."""
    ids = torch.cat(documents).numpy().astype(np.int32)
    starts = np.cumsum([0, *(len(each) for each in documents[:-1])]).astype(np.int32)
    row = np.zeros((1, seq_len), np.int32)
    row[0, : len(ids)] = ids
    return make_rows(np.zeros(1, np.int64), row, [starts], np.asarray([len(ids)], np.int32))


def draw_documents() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 128, (length,)) for length in LENGTHS]


@pytest.mark.parametrize("family", [*WINDOWED, *OTHERS])
def test_the_loss_of_a_packed_row_and_its_gradients_are_those_of_every_document_alone(family: str) -> None:
    model, documents = build_family(family), draw_documents()
    report = ask_model(model, seq_len=72)
    use_eager(model)
    wanted = compute_own_loss(model, [document[None] for document in documents])
    wanted.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    set_attention(model, "eager") if report.recipe.attention == "eager" else model.set_attn_implementation("sdpa")

    loss_model = LossModel(model, report.recipe)
    batches = make_batches(pack(documents), 1, report.recipe, CPU)
    found = sum((loss_model(batch) for batch in batches), start=torch.zeros(()))
    found.backward()

    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert sum(batch.num_labels for batch in batches) == sum(LENGTHS) - 3
    for name, value in model.named_parameters():
        if name in gradients:
            assert value.grad is not None, name
            torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize(
    ("family", "rows", "attention"),
    [
        ("qwen3", "packed", "any"),
        ("mistral", "packed", "any"),
        ("gemma2", "packed", "eager"),
        ("codegen", "packed", "any"),
        ("lfm2", "alone", "any"),
        ("bloom", "alone", "any"),
    ],
)
def test_the_cheapest_way_that_is_exact_is_taken(family: str, rows: str, attention: str) -> None:
    """LFM2's convolutions and BLOOM's biases take no notice of positions; PyTorch's kernels cap no scores as Gemma 2 does."""
    report = ask_model(build_family(family), seq_len=72)
    assert (report.recipe.rows, report.recipe.attention) == (rows, attention)
    assert bool(report.refused) == ((rows, attention) != ("packed", "any"))
    assert "price" in report.sentence or not report.refused


def change_head(model: nn.Module, family: str, what: str) -> None:
    """Gives any family a head that does more than most."""
    if what == "bias":
        head = nn.Linear(32, 128)
        head.weight = model.get_output_embeddings().weight
        torch.nn.init.normal_(head.bias)
        model.set_output_embeddings(head)
        return
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        output = plain(*args, **kwargs)
        output.logits = 3.0 * torch.tanh(output.logits / 3.0) if what == "cap" else output.logits * 0.3
        if labels is not None:
            output.loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
        return output

    model.forward = forward


def drop_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense mask of documents and causality, as it is given to every layer alike."""
    make = step.make_inputs

    def with_mask(model: nn.Module, ids: torch.Tensor, positions: torch.Tensor | None = None) -> dict[str, Any]:
        inputs = make(model, ids, positions)
        if positions is not None:
            documents = (positions == 0).cumsum(-1)
            inputs["attention_mask"] = torch.tril(documents[:, :, None] == documents[:, None, :])[:, None]
        return inputs

    monkeypatch.setattr(step, "make_inputs", with_mask)


def shift_positions(shift: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        make = step.make_inputs

        def shifted(model: nn.Module, ids: torch.Tensor, positions: torch.Tensor | None = None) -> dict[str, Any]:
            return make(model, ids, None if positions is None else shift(positions))

        monkeypatch.setattr(step, "make_inputs", shifted)

    return apply


def drop_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = step.compute_loss_sum
    monkeypatch.setattr(
        step, "compute_loss_sum", lambda hidden, weight, labels, bias, **rest: compute(hidden, weight, labels, **rest)
    )


def forget_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "find_head_form", lambda model, head: HeadForm())


FAULTS: dict[str, tuple[str | None, Callable[[pytest.MonkeyPatch], None]]] = {
    "boundary off by one": (None, shift_positions(lambda positions: positions.roll(1, -1))),
    "state carried over": (None, shift_positions(lambda positions: torch.arange(positions.shape[1])[None])),
    "window dropped": (None, drop_window),
    "bias dropped": ("bias", drop_bias),
    "cap dropped": ("cap", forget_head),
    "factor dropped": ("factor", forget_head),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", WINDOWED)
def test_every_fault_is_found_in_every_family(family: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faulty way is not taken before training, and ends a run that has taken it."""
    needs, inject = FAULTS[fault]
    model = build_family(family)
    if needs is not None:
        change_head(model, family, needs)
    right = ask_model(model, seq_len=72)
    inject(monkeypatch)
    found = ask_model(model, seq_len=72)
    assert len(found.refused) > len(right.refused)
    set_attention(model, "eager" if right.recipe.attention == "eager" else "sdpa")
    taken = LossRecipe(
        right.recipe.rows, right.recipe.attention, right.recipe.head if needs in (None, "bias") else HeadForm()
    )
    with pytest.raises(ModelError, match="placed for training"):
        confirm_recipe(LossModel(model, taken), seq_len=72, dtype=torch.float32)


@pytest.mark.parametrize(("factor", "softcap"), [(1.0, None), (0.0625, None), (1.0, 30.0), (0.5, 5.0)])
def test_factor_and_cap_are_read_from_what_the_model_does(factor: float, softcap: float | None) -> None:
    model = build_family("qwen3")
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * factor
        if softcap is not None:
            output.logits = torch.tanh(output.logits / softcap) * softcap
        return output

    model.forward = forward
    assert find_head_form(model, model.get_output_embeddings()) == HeadForm("linear", factor, softcap)


def test_a_head_that_does_anything_else_is_left_to_the_model() -> None:
    model = build_family("qwen3")
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits + 0.01 * output.logits.square()
        return output

    model.forward = forward
    assert find_head_form(model, model.get_output_embeddings()) == HeadForm("own")
    report = ask_model_without_labels(model)
    assert report.recipe.head.kind == "own" and "all logits" in report.sentence


def ask_model_without_labels(model: nn.Module) -> self_test.SelfTestReport:
    """The changed model's answer to labels is still that of the unchanged one, so it is not asked for."""
    inner = model.forward

    def forward(*args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = forward
    return ask_model(model, seq_len=72)


def test_a_model_that_looks_at_later_tokens_is_refused_with_what_was_measured() -> None:
    model = build_family("qwen3")
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ModelError, match=r"Qwen3ForCausalLM: no way to compute its loss over documents"):
        ask_model(model, seq_len=72)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = build_family("qwen3")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        ask_model(model, seq_len=72)


def test_a_run_is_bound_to_its_recipe() -> None:
    model = build_family("gemma2")
    report = ask_model(model, seq_len=72)
    placed = LossModel(model, report.recipe)
    state = prove_loss(placed, TrainState(), seq_len=72, dtype=torch.float32, world_size=1)
    assert (state.loss_recipe, state.self_tests) == (report.recipe.text, 1)
    assert state.self_test_difference < 1e-4
    again = prove_loss(placed, state.model_copy(update={"step": 3}), seq_len=72, dtype=torch.float32, world_size=1)
    assert again.self_tests == 2
    other = state.model_copy(update={"step": 3, "loss_recipe": "packed rows, any attention, linear head"})
    with pytest.raises(CheckpointError, match=r"step 3: it was trained by another loss \(packed rows, any"):
        prove_loss(placed, other, seq_len=72, dtype=torch.float32, world_size=1)


@pytest.mark.parametrize(
    ("family", "seq_len", "goes_on"),
    [("qwen3", 72, True), ("mistral", 8, True), ("mistral", 72, False), ("phi", 72, False)],
)
def test_a_checkpoint_of_before_goes_on_where_its_loss_was_this_one(family: str, seq_len: int, goes_on: bool) -> None:
    """Before the model was asked, windows and biases were lost; rows no longer than the window never knew."""
    model = build_family(family)
    placed = LossModel(model, ask_model(model, seq_len=seq_len).recipe)
    old = TrainState(step=5)
    if goes_on:
        assert prove_loss(placed, old, seq_len=seq_len, dtype=torch.float32, world_size=1).loss_recipe
    else:
        with pytest.raises(CheckpointError, match="one dense mask"):
            prove_loss(placed, old, seq_len=seq_len, dtype=torch.float32, world_size=1)


def test_a_recipe_survives_its_json() -> None:
    recipe = LossRecipe("alone", "eager", HeadForm("linear", 0.25, 30.0))
    assert LossRecipe.from_json(recipe.to_json()) == recipe
    assert recipe.text == "one document per row, plain attention, linear head, logits times 0.25, logits capped at 30"


def test_documents_alone_fill_no_more_tokens_than_packed_rows_and_lose_no_label() -> None:
    rows = pack(draw_documents())
    batches = make_batches(rows, 1, LossRecipe("alone"), CPU)
    assert [tuple(batch.input_ids_BT.shape) for batch in batches] == [(2, 30), (1, 14)]
    assert all(batch.input_ids_BT.numel() <= 72 for batch in batches)
    (packed,) = make_batches(rows, 1, LossRecipe(), CPU)
    assert sum(batch.num_labels for batch in batches) == packed.num_labels
