"""FlexAttention within documents, by forward passes: PyTorch has no backward pass of it on a CPU (tests/gpu has one)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from layerplan.config.train import TrainConfig
from layerplan.errors import TrainingError
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape
from layerplan.train import attention
from layerplan.train.attention import choose_attention, set_attention, time_attention
from layerplan.train.document_attention import OFFSETS, WHOLE_ROWS, UnservedAttentionError
from layerplan.train.flex_documents import BLOCK, FLEX, attend_flex, find_windows, make_mask, make_masks
from layerplan.train.loss_proof import find_document_fault
from layerplan.train.self_test import ask_model
from layerplan.train.step import LossModel, make_batch
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.small_families import build_family
from tests.tiny_loop import make_rows

PACKED = {
    "short": [[20, 30, 250], [300], [1, 2, 297]],
    "long": [[128, 256, 640], [1024], [1, 1, 1, 1000, 21]],
    "one over": [[129], [128, 1], [1, 128]],
    "tokens": [[1] * 200],
}
"""Lengths of documents by row; some end with a block, some rows with one token of another."""
SHAPE = ModelShape.from_hf_config(TINY_QWEN3 | {"max_position_embeddings": 64})


def make_positions(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def spell_out(lengths: list[list[int]], window: int | None) -> Tensor:
    """What a query sees of a key, (B, T, T)."""
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    places = torch.arange(documents.shape[1])
    distance = places[:, None] - places[None, :]
    seen = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def list_dense(counts: Tensor, indices: Tensor) -> Tensor:
    """From the blocks that each block of queries lists to a matrix of booleans."""
    listed = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape)).tolist():
        row, head, query = place
        listed[row, head, query, indices[row, head, query, : counts[row, head, query]].long()] = True
    return listed[:, 0]


@pytest.mark.parametrize("window", [None, 1, 100, 129])
@pytest.mark.parametrize("case", PACKED)
def test_a_block_is_looked_into_when_something_in_it_is_seen(case: str, window: int | None) -> None:
    lengths = PACKED[case]
    seen = spell_out(lengths, window)
    mask = make_mask(make_positions(lengths), window)
    num_blocks = -(-seen.shape[1] // BLOCK)
    assert mask.shape[-2:] == seen.shape[-2:]
    some = torch.zeros(len(lengths), num_blocks, num_blocks, dtype=torch.bool)
    every = some.clone()
    for query in range(num_blocks):
        for key in range(num_blocks):
            block = seen[:, query * BLOCK : (query + 1) * BLOCK, key * BLOCK : (key + 1) * BLOCK].flatten(1)
            some[:, query, key], every[:, query, key] = block.any(1), block.all(1)
    partly = list_dense(mask.kv_num_blocks, mask.kv_indices)
    whole = list_dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    on_diagonal = torch.eye(num_blocks, dtype=torch.bool)
    assert torch.equal(whole, every & ~on_diagonal) and torch.equal(partly, some & ~whole)
    assert torch.equal(list_dense(mask.q_num_blocks, mask.q_indices), partly.mT)
    assert torch.equal(list_dense(mask.full_q_num_blocks, mask.full_q_indices), whole.mT)
    places = torch.arange(seen.shape[1])
    inside = [mask.mask_mod(torch.tensor(row), torch.tensor(0), places[:, None], places) for row in range(len(lengths))]
    assert torch.equal(torch.stack(inside), seen)


def test_no_value_is_read_to_make_it() -> None:
    positions = make_positions(PACKED["long"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        make_masks(positions, tuple(positions.shape), (100,), positions.device)
    reads = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero"}
    assert not reads & {event.name for event in profiler.events()}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2)])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("case", ["short", "long"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_it_gives_what_a_mask_gives(case: str, window: int | None, heads: tuple[int, int]) -> None:
    lengths, draw = PACKED[case], torch.Generator().manual_seed(0)
    positions = make_positions(lengths)
    query, key, value = (torch.randn(3, count, positions.shape[1], 16, generator=draw) for count in (*heads, heads[1]))
    seen = spell_out(lengths, window)[:, None]
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    masks = make_masks(positions, tuple(positions.shape), (100, 5000), positions.device)
    asked = {"scaling": 0.3, "sliding_window": window, OFFSETS: masks}
    found, _ = attend_flex(nn.Module(), query, key, value, None, **asked)
    assert (found.transpose(1, 2) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rows_of_one_document_need_no_mask_but_for_windows() -> None:
    query = torch.randn(2, 4, 300, 16)
    size, device = (2, 300), query.device
    assert make_masks(None, size, (300, 5000), device) is None
    masks = make_masks(None, size, (100,), device)
    assert masks is not None and set(masks) == {100}
    for window, marks in ((None, WHOLE_ROWS), (None, masks), (100, masks)):
        seen = spell_out([[300]], window)[:, None]
        wanted = scaled_dot_product_attention(query, query, query, attn_mask=seen)
        found, _ = attend_flex(nn.Module(), query, query, query, None, sliding_window=window, **{OFFSETS: marks})
        assert (found.transpose(1, 2) - wanted).norm() <= 1e-5 * wanted.norm()
    with pytest.raises(UnservedAttentionError, match="a window of 50 that no layer names"):
        attend_flex(nn.Module(), query, query, query, None, sliding_window=50, **{OFFSETS: masks})


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        *(
            (family, None)
            for family in ("qwen3", "mistral", "qwen2", "phi3", "starcoder2", "olmo3", "cohere2", "exaone4")
        ),
        ("gemma2", "asks for softcap"),
        ("codegen", "has attention of its own"),
        ("llama4_text", "a loss of"),
    ],
)
def test_the_model_says_whether_it_serves(family: str, fault: str | None) -> None:
    """By its loss over packed rows, against its own over each document alone."""
    model = build_family(family)
    recipe = ask_model(model, seq_len=64).recipe
    before = model.config._attn_implementation
    found = find_document_fault(model, recipe, "flex", seq_len=64)
    assert found is None if fault is None else fault in (found or "")
    assert model.config._attn_implementation == before and not model.training


def test_layers_name_their_windows() -> None:
    assert find_windows(build_family("mistral", sliding_window=12)) == {12}
    assert find_windows(build_tiny_qwen3()) == frozenset()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_compiled_layers_are_compiled_once_whatever_the_documents_are() -> None:
    model = build_tiny_qwen3(**TINY_QWEN3 | {"max_position_embeddings": 64})
    set_attention(model, FLEX)
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend=counter, dynamic=False)
    run = LossModel(model)
    with torch.no_grad():
        losses = [
            float(run(make_batch(make_rows(step, batch=2, vocab_size=40, start=start), torch.device("cpu"))))
            for step, start in ((0, 3), (1, 5), (2, 7))
        ]
    assert counter.frame_count == 1 and len(set(losses)) == 3


def choose(monkeypatch: pytest.MonkeyPatch, order: list[str], find_fault: Callable[[str], str | None]) -> str:
    """On a GPU that is not asked how fast it is."""
    monkeypatch.setattr(attention, "order_by_time", lambda *args: ["sdpa"])
    config = TrainConfig(compute_dtype="bfloat16", compile=True)
    settings = (config, SHAPE, 64, torch.device("cuda"), LossRecipe())
    return choose_attention(*settings, find_fault, agree=lambda names: order)


def test_the_fastest_that_serves_the_model_is_chosen_and_no_other_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find_fault(name: str) -> str | None:
        asked.append(name)
        return "asks for a window" if name == "flex" else None

    assert choose(monkeypatch, ["flex", "varlen", "sdpa"], find_fault) == "varlen" and asked == ["flex", "varlen"]
    assert choose(monkeypatch, ["sdpa", "flex"], find_fault) == "sdpa" and len(asked) == 2
    assert choose(monkeypatch, ["flex"], find_fault) == "sdpa"


def test_it_is_for_gpus() -> None:
    with pytest.raises(TrainingError, match="it is for GPUs, this worker computes on a cpu"):
        choose_attention(TrainConfig(attention="flex"), SHAPE, 64, torch.device("cpu"), LossRecipe())


@pytest.mark.parametrize("name", ["sdpa", "segmented", "causal"])
def test_what_is_timed_is_what_a_layer_calls(name: str) -> None:
    assert time_attention(name, SHAPE, 64, 2, torch.device("cpu"), torch.float32) > 0
