"""The pure step: loss, labels, masks and gradients against plain transformers and plain PyTorch, in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3ForCausalLM

from layerplan.corpus.rows import PackedRows
from layerplan.plan.loss_recipe import HeadForm, LossRecipe
from layerplan.plan.memory import choose_chunk_rows, count_rows_of_sum
from layerplan.train import loss as loss_module
from layerplan.train.loss import IGNORED, LossOptions, compute_loss_sum, make_labels
from layerplan.train.self_test import confirm_recipe
from layerplan.train.step import LossModel, accumulate_gradients, make_batch
from tests.allocations import count_peak_bytes
from tests.qwen3 import build_tiny_qwen3
from tests.small_families import build_family

CPU = torch.device("cpu")
VOCAB = 67


def make_model(is_tied: bool = True) -> Qwen3ForCausalLM:
    return build_tiny_qwen3(vocab_size=VOCAB, num_hidden_layers=2, tie_word_embeddings=is_tied).train()


def make_rows(lengths: list[int], num_rows: int = 2, seq_len: int = 16, seed: int = 0) -> PackedRows:
    rng = np.random.default_rng(seed)
    document = np.concatenate([np.full(length, index) for index, length in enumerate(lengths)])
    position = np.concatenate([np.arange(length) for length in lengths])
    padding = seq_len - len(document)
    document = np.concatenate([document, np.full(padding, -1)])
    position = np.concatenate([position, np.zeros(padding)])
    return PackedRows(
        np.arange(num_rows, dtype=np.int64),
        rng.integers(0, VOCAB, (num_rows, seq_len), dtype=np.int32),
        np.tile(document, (num_rows, 1)).astype(np.int32),
        np.tile(position, (num_rows, 1)).astype(np.int32),
    )


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, options: LossOptions) -> torch.Tensor:
    logits = hidden.float() @ weight.float().T
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if options.z_weight == 0:
        return total
    return total + options.z_weight * (logits.logsumexp(-1).square() * (labels != IGNORED)).sum()


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(softcap=3.0), LossOptions(z_weight=0.01)])
@pytest.mark.parametrize("core", ["_chunk", "_chunk_fused"])
def test_chunked_loss_and_gradients_equal_the_plain_ones(
    options: LossOptions, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "choose_chunk_rows", lambda *sizes, **rest: 3)
    monkeypatch.setattr(loss_module, "_chunk", getattr(loss_module, core))
    torch.manual_seed(1)
    hidden = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(VOCAB, 8, requires_grad=True)
    labels = torch.randint(0, VOCAB, (10,))
    labels[4] = IGNORED
    expected = plain_loss(hidden, weight, labels, options)
    wanted = torch.autograd.grad(expected * 0.25, (hidden, weight))
    for scale in (0.25, 1.0):
        found = compute_loss_sum(hidden, weight, labels, scale=scale, options=options)
        grads = torch.autograd.grad(found * 0.25, (hidden, weight))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for grad, want in zip(grads, wanted):
            torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


def test_bfloat16_losses_and_gradients_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "choose_chunk_rows", lambda *sizes, **rest: 16)
    torch.manual_seed(1)
    hidden = torch.randn(4096, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, 8, dtype=torch.bfloat16)
    labels = torch.randint(0, VOCAB, (4096,))
    found = compute_loss_sum(hidden, weight, labels)
    found.backward()
    logits = (hidden @ weight.T).float()
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert abs(float((found - expected).detach())) / float(expected) < 1e-6
    assert hidden.grad is not None

    trained = weight.clone().requires_grad_()
    compute_loss_sum(hidden, trained, labels).backward()
    exact = weight.float().requires_grad_()
    F.cross_entropy(hidden.detach().float() @ exact.T, labels, reduction="sum").backward()
    assert trained.grad is not None and exact.grad is not None
    error = (trained.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-2, "256 chunks whose products were summed in bfloat16 would lose more"


@pytest.mark.parametrize("num_rows", [700, 1500])
def test_one_chunk_or_equal_ones_give_a_bfloat16_head_its_gradient(num_rows: int) -> None:
    """700 rows of width 512 are one chunk, 1,500 two of 750, whose products are summed in pieces; each is compiled once."""
    torch.manual_seed(1)
    hidden = torch.randn(num_rows, 512).mul_(0.3).bfloat16().requires_grad_()
    weight = torch.randn(5000, 512).mul_(0.3).bfloat16().requires_grad_()
    labels = torch.randint(0, 5000, (num_rows,))
    found = compute_loss_sum(hidden, weight, labels, scale=1 / 1022, options=LossOptions(compiled=True))
    grads = torch.autograd.grad(found / 1022, (hidden, weight))
    wide = [each.detach().float().requires_grad_() for each in (hidden, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum")
    wanted = torch.autograd.grad(expected / 1022, wide)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    for ours, theirs in zip(grads, wanted):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()


def test_a_chunk_takes_the_memory_of_the_sum_it_stands_for() -> None:
    """Of 1,024 positions: logits and the gradient of the head in bfloat16, 6 bytes an entry of the head; a sum takes 4 of them
    and pieces beside. In float32 and where the head is frozen chunks are what they were.
    """
    assert choose_chunk_rows("cpu", 5000, rows_of_sum=count_rows_of_sum(512, 2, trains_head=True, fused=True)) == 1024
    others: list[dict[str, Any]] = [
        {"dtype_bytes": 4, "trains_head": True, "fused": True},
        {"dtype_bytes": 2, "trains_head": False, "fused": True},
        {"dtype_bytes": 2, "trains_head": True, "fused": False},
    ]
    assert [count_rows_of_sum(512, **other) for other in others] == [0, 0, 0]
    hidden = torch.randn(1024, 512).bfloat16().requires_grad_()
    weight = torch.randn(5000, 512).bfloat16().requires_grad_()
    labels = torch.randint(0, 5000, (1024,))
    options = LossOptions(compiled=True)
    compute_loss_sum(hidden, weight, labels, options=options)
    peak = count_peak_bytes(lambda: compute_loss_sum(hidden, weight, labels, options=options).backward())
    assert peak < 6 * 5000 * 512 + 3 * 2 * 1024 * 512, f"{peak:,} bytes: as predicted, with three copies of the states"


def test_gradients_that_carry_the_scale_are_not_multiplied_again() -> None:
    """A scale that float32 does not hold exactly, as most are, is still the one that backward is given."""
    hidden = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(VOCAB, 8, requires_grad=True)
    loss = compute_loss_sum(hidden, weight, torch.randint(0, VOCAB, (10,)), scale=1 / 1022)
    scaled = loss * (1 / 1022)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        scaled.backward()
    sizes = [event.input_shapes for event in seen.events() if event.name in ("aten::mul", "aten::mul_", "aten::div")]
    assert len(sizes) == 1, "the multiplication by the scale alone"


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("trains_head", [True, False])
def test_the_logits_take_less_than_a_tenth_of_the_plain_losss_memory(is_compiled: bool, trains_head: bool) -> None:
    """Of 1,024 positions, as the benchmarks train on; the plain loss keeps three times the logits.

    The head's gradient, as large as the head, comes on top of ours, and is next to nothing for so narrow a model.
    """
    vocab_size = 20_000
    hidden = torch.randn(1024, 8, requires_grad=True)
    weight = torch.randn(vocab_size, 8, requires_grad=trains_head)
    labels = torch.randint(0, vocab_size, (1024,))
    options = LossOptions(compiled=is_compiled)
    compute_loss_sum(hidden, weight, labels, options=options)

    plain = count_peak_bytes(lambda: plain_loss(hidden, weight, labels, options).backward())
    chunked = count_peak_bytes(lambda: compute_loss_sum(hidden, weight, labels, options=options).backward())
    assert plain > 3 * 1024 * vocab_size * 4
    assert chunked < 0.1 * plain, f"{chunked:,} bytes against {plain:,}"


def test_labels_stay_inside_their_document() -> None:
    labels = make_labels(torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([[0, 0, 1, 1, 1, -1]]))
    assert labels.tolist() == [[6, IGNORED, 8, 9, IGNORED, IGNORED]]


@pytest.mark.parametrize("is_tied", [True, False])
def test_loss_and_gradients_equal_plain_transformers(is_tied: bool) -> None:
    rows = make_rows([16])
    batch = make_batch(rows, CPU)
    model, reference = make_model(is_tied), make_model(is_tied)
    loss = accumulate_gradients(LossModel(model), [batch], scale=1 / batch.num_labels) / batch.num_labels
    wanted = reference(input_ids=batch.input_ids_BT, labels=batch.input_ids_BT).loss
    wanted.backward()
    assert abs(float(loss - wanted)) < 1e-5
    for (name, found), expected in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_a_softcapped_family_keeps_its_loss() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=5.0,
    )
    model = Gemma2ForCausalLM(config).float().train()
    batch = make_batch(make_rows([16]), CPU)
    found = LossModel(model, LossRecipe(head=HeadForm(softcap=5.0)))(batch) / batch.num_labels
    wanted = model(input_ids=batch.input_ids_BT, labels=batch.input_ids_BT).loss
    assert abs(float(found - wanted)) < 1e-5


def test_one_document_never_changes_the_loss_of_another() -> None:
    """The packed row's loss is the sum of its documents' own, whatever stands before them."""
    rows = make_rows([5, 7], num_rows=1)
    model = LossModel(make_model())
    together = float(model(make_batch(rows, CPU)))
    alone = 0.0
    for start, stop in ((0, 5), (5, 12)):
        piece = PackedRows(
            rows.row_ids,
            rows.input_ids[:, start:stop],
            np.zeros((1, stop - start), np.int32),
            rows.position_ids[:, start:stop],
        )
        alone += float(model(make_batch(piece, CPU)))
    assert abs(together - alone) < 1e-5
    ids = rows.input_ids.copy()
    ids[:, :4] = (ids[:, :4] + 1) % VOCAB
    changed = PackedRows(rows.row_ids, ids, rows.document_ids, rows.position_ids)
    hidden = []
    for each in (rows, changed):
        batch = make_batch(each, CPU)
        output = model.causal_lm.base_model(
            input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
        )
        hidden.append(output.last_hidden_state[:, 5:12])
    assert torch.equal(*hidden)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2"])
def test_whole_rows_have_the_loss_that_transformers_gives_them_as_one_text(family: str) -> None:
    """Documents of 6, 9 and 12 tokens and 5 of padding; a window of 8 in Mistral and Gemma 2."""
    model = build_family(family)
    rows = make_rows([6, 9, 12], seq_len=32)
    batches = LossModel(model, recipe := LossRecipe(rows="whole")).make_batches(rows, 2, CPU)
    assert len(batches) == 1 and batches[0].position_ids_BT is None and batches[0].num_labels == 2 * 26
    ids = torch.from_numpy(rows.input_ids[:, :27].astype(np.int64))
    model.set_attn_implementation("eager")
    wanted = float(model(input_ids=ids, labels=ids, use_cache=False).loss.detach())
    cap = getattr(model.config, "final_logit_softcapping", None)
    found = float(LossModel(model, replace(recipe, head=HeadForm(softcap=cap)))(batches[0]).detach()) / 52
    assert found == pytest.approx(wanted, rel=1e-5)
    confirm_recipe(LossModel(model, replace(recipe, head=HeadForm(softcap=cap))), seq_len=32, dtype=torch.float32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_variants_agree_on_packed_rows(attention: str) -> None:
    batch = make_batch(make_rows([5, 7]), CPU)
    model = make_model()
    wanted = float(LossModel(model)(batch))
    model.set_attn_implementation(attention)
    assert abs(float(LossModel(model)(batch)) - wanted) < 1e-4


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    rows = make_rows([6, 8], num_rows=4)
    whole, pieces = make_model(), make_model()
    labels = make_batch(rows, CPU).num_labels
    one = accumulate_gradients(LossModel(whole), [make_batch(rows, CPU)], 1 / labels)
    several = accumulate_gradients(LossModel(pieces), [make_batch(piece, CPU) for piece in rows.split(1)], 1 / labels)
    assert abs(float(one - several)) < 1e-3
    for found, expected in zip(pieces.parameters(), whole.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6)
