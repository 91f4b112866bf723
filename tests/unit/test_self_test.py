"""The model is asked how its loss is computed: what it answers is held against transformers' own loss of each document alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening

from layerplan.corpus.rows import PackedRows, make_rows
from layerplan.errors import CheckpointError, ModelError
from layerplan.models.document_starts import find_start_arguments, mark_starts
from layerplan.models.head import find_head_form
from layerplan.plan.loss_recipe import HeadForm, LossRecipe
from layerplan.train import self_test, step
from layerplan.train.attention import set_attention
from layerplan.train.loss_proof import prove_loss
from layerplan.train.self_test import ask_model, confirm_recipe
from layerplan.train.state import TrainState
from layerplan.train.step import LossModel, accumulate_gradients, make_batches
from tests.families import make_model
from tests.family_oracle import compute_own_loss, use_eager
from tests.small_families import OTHERS, WINDOWED, build_family

CPU = torch.device("cpu")
LENGTHS = (20, 30, 14)


def pack(documents: list[torch.Tensor], seq_len: int = 72) -> PackedRows:
    """One row, padded at its end."""
    return pack_rows([documents], seq_len)


def pack_rows(rows: list[list[torch.Tensor]], seq_len: int = 72) -> PackedRows:
    ids = np.zeros((len(rows), seq_len), np.int32)
    used = np.asarray([sum(map(len, documents)) for documents in rows], np.int32)
    for row, documents in enumerate(rows):
        ids[row, : used[row]] = torch.cat(documents).numpy()
    starts = [np.cumsum([0, *map(len, documents[:-1])]).astype(np.int32) for documents in rows]
    return make_rows(np.arange(len(rows), dtype=np.int64), ids, starts, used)


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
        ("llama4_text", "alone", "any"),
    ],
)
def test_the_cheapest_way_that_is_exact_is_taken(family: str, rows: str, attention: str) -> None:
    """LFM2's convolutions, BLOOM's biases and Llama 4's chunks take no notice of where documents start; PyTorch's kernels cap no
    scores as Gemma 2 does.
    """
    report = ask_model(build_family(family), seq_len=72)
    assert (report.recipe.rows, report.recipe.attention) == (rows, attention)
    assert bool(report.refused) == ((rows, attention) != ("packed", "any"))
    assert "price" in report.sentence or not report.refused


def test_a_cap_counts_though_fresh_weights_do_not_show_it() -> None:
    model = build_family("gemma2")
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 1e-3
    report = ask_model(model, seq_len=72)
    assert report.recipe.attention == "eager"
    assert "drop the cap" in report.sentence


def convolve_within_documents(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """What the CUDA kernel that LFM2 asks for does with `seq_idx`: no product crosses into another document."""
    marks = torch.zeros_like(hidden[:, 0]) if seq_idx is None else seq_idx
    total = hidden * weight[:, -1:]
    for step_back in range(1, weight.shape[-1]):
        is_same = (marks[:, step_back:] == marks[:, :-step_back])[:, None]
        earlier = hidden[:, :, :-step_back] * weight[:, -1 - step_back, None] * is_same
        total = total + nn.functional.pad(earlier, (step_back, 0))
    return total if bias is None else total + bias[:, None]


def test_starts_of_documents_are_given_to_layers_whose_kernels_obey_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = build_family("lfm2"), draw_documents()
    monkeypatch.setattr("transformers.models.lfm2.modeling_lfm2.causal_conv1d_fn", convolve_within_documents)
    report = ask_model(model, seq_len=72)
    assert (report.recipe.rows, report.recipe.attention, len(report.refused)) == ("reset", "any", 2)
    assert "a micro-batch is one row" in report.sentence
    monkeypatch.undo()  # documents alone need no kernel of ours
    use_eager(model)
    wanted = compute_own_loss(model, [document[None] for document in documents])
    wanted.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    monkeypatch.setattr("transformers.models.lfm2.modeling_lfm2.causal_conv1d_fn", convolve_within_documents)
    model.set_attn_implementation("sdpa")

    rows = pack_rows([documents[:2], documents[2:]])
    batches = make_batches(rows, 2, report.recipe, CPU)
    found = accumulate_gradients(LossModel(model, report.recipe), batches, 1.0)

    assert [tuple(batch.input_ids_BT.shape) for batch in batches] == [(1, 72), (1, 72)]
    assert float(found) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=2e-3, msg=name)
    placed = LossModel(model, report.recipe)
    confirm_recipe(placed, seq_len=72, dtype=torch.float32)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="placed for training"):
        confirm_recipe(placed, seq_len=72, dtype=torch.float32)


def test_starts_are_those_of_the_library_and_only_where_a_forward_pass_declares_them() -> None:
    lengths = (3, 2, 4)
    names = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    collate = DataCollatorWithFlattening(return_position_ids=True, return_flash_attn_kwargs=True, return_seq_idx=True)
    wanted = collate([{"input_ids": list(range(length))} for length in lengths])
    found = mark_starts(names, wanted["position_ids"])
    for name in names[:3]:
        assert found[name].dtype == wanted[name].dtype and found[name].tolist() == wanted[name].tolist()
    assert [found[name] for name in names[3:]] == [wanted[name] for name in names[3:]] == [4, 4]

    class Named(nn.Module):
        def forward(self, input_ids: torch.Tensor, seq_idx: torch.Tensor | None = None, **rest: Any) -> None:
            """Declares one by name; what else it takes, nobody knows."""

    assert find_start_arguments(build_family("lfm2")) == names
    assert find_start_arguments(build_family("bloom")) == ()
    assert find_start_arguments(Named()) == ("seq_idx",)


def test_the_weights_are_read_once_for_each_thing_that_is_asked() -> None:
    """Once for the documents alone and all that follows the layers, and once for the recipe; placed, once for each."""
    model, passes = build_family("qwen3"), []
    handle = model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    report = ask_model(model, seq_len=72)
    assert len(passes) == 2
    confirm_recipe(LossModel(model, report.recipe), seq_len=72, dtype=torch.float32)
    handle.remove()
    assert len(passes) == 4


def test_a_gradient_that_is_wrong_by_a_little_everywhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by 2e-4 in every parameter: less than what rounding may do to one, more than it may do to all."""
    compute = step.compute_loss_sum

    def stretched(*args: Any, **options: Any) -> torch.Tensor:
        loss = compute(*args, **options)
        return loss + 2e-4 * (loss - loss.detach())

    monkeypatch.setattr(step, "compute_loss_sum", stretched)
    report = ask_model(build_family("qwen3"), seq_len=72)
    assert report.recipe.head.kind == "own"
    assert "the gradient of all parameters differs by 0.0002 of its norm" in report.refused[0]


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
            output.loss = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
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
    reset = LossRecipe("reset")
    assert LossRecipe.from_json(reset.to_json()) == reset
    assert reset.text == "packed rows with the starts of documents given, any attention, linear head"


def test_documents_alone_fill_no_more_tokens_than_packed_rows_and_lose_no_label() -> None:
    rows = pack(draw_documents())
    batches = make_batches(rows, 1, LossRecipe("alone"), CPU)
    assert [tuple(batch.input_ids_BT.shape) for batch in batches] == [(2, 30), (1, 14)]
    assert all(batch.input_ids_BT.numel() <= 72 for batch in batches)
    (packed,) = make_batches(rows, 1, LossRecipe(), CPU)
    assert sum(batch.num_labels for batch in batches) == packed.num_labels


@pytest.mark.parametrize("asks", [True, False])
def test_a_loss_of_routers_balance_that_is_not_trained_is_told(asks: bool) -> None:
    """`transformers` adds it to the loss of a Mixtral whose config asks for the routers' state."""
    model = make_model("mixtral")
    model.config.output_router_logits = asks
    ids = torch.arange(3, 23)[None]
    plain = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    assert (float((model(input_ids=ids, labels=ids).loss - plain).detach()) > 1e-4) == asks
    report = ask_model(model, seq_len=72)
    assert ("its routers' balance, which is not trained" in report.sentence) == asks == report.leaves_balance
    assert model.config.output_router_logits == asks
