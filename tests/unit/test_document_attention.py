"""Attention within documents against PyTorch's own under a mask, and in the models of eight families."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from layerplan.config.train import TrainConfig
from layerplan.errors import TrainingError
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape
from layerplan.train.attention import choose_attention
from layerplan.train.document_attention import (
    OFFSETS,
    SEGMENTED,
    UnservedAttentionError,
    attend_segmented,
    find_offsets,
)
from layerplan.train.loss_proof import find_document_fault
from layerplan.train.step import make_batch
from tests.documents_alone import check_packed
from tests.qwen3 import TINY_QWEN3
from tests.small_families import build_family
from tests.tiny_loop import make_rows

LENGTHS = [[20, 30, 14], [64], [1, 2, 61]]


def make_starts(lengths: list[list[int]]) -> np.ndarray:
    starts = np.zeros((len(lengths), sum(lengths[0])), dtype=bool)
    for row, documents in enumerate(lengths):
        starts[row, np.cumsum([0, *documents[:-1]])] = True
    return starts


def make_mask(starts: np.ndarray, window: int | None) -> Tensor:
    """What a query may see, spelled out: its own document, no later token, no further back than the window."""
    documents = torch.from_numpy(np.cumsum(starts, axis=1))
    distance = torch.arange(starts.shape[1])[:, None] - torch.arange(starts.shape[1])[None, :]
    seen = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0)
    return (seen if window is None else seen & (distance < window))[:, None]


def test_offsets_are_the_starts_and_then_the_end_in_few_sizes() -> None:
    offsets = find_offsets(make_starts(LENGTHS))
    assert offsets.dtype == np.int32
    assert offsets.tolist() == [0, 20, 50, 64, 128, 129, 131, *[192] * 9]
    assert len(find_offsets(np.ones((1, 40), dtype=bool))) == 64


def test_a_batch_brings_the_starts_of_its_documents_along_so_that_no_device_is_asked() -> None:
    rows = make_rows(0, batch=2, vocab_size=40, start=5)
    batch = make_batch(rows, torch.device("cpu"))
    assert batch.offsets is not None and batch.start_layer is None
    assert batch.offsets.tolist()[:5] == [0, 5, 12, 17, 24]
    assert batch.find_offsets() is batch.offsets


@pytest.mark.parametrize("window", [None, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_give_what_a_mask_gives_forward_and_backward(window: int | None, dtype: torch.dtype) -> None:
    starts = make_starts(LENGTHS)
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, heads, 64, 16, generator=draw).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    weight = torch.randn(3, 4, 64, 16, generator=draw)
    wanted = scaled_dot_product_attention(
        *(each.float() for each in inputs), attn_mask=make_mask(starts, window), scale=0.3, enable_gqa=True
    )
    expected = torch.autograd.grad((wanted * weight).sum(), inputs)
    asked = {"scaling": 0.3, "sliding_window": window, OFFSETS: torch.from_numpy(find_offsets(starts))}
    found, _ = attend_segmented(nn.Module(), *inputs, None, **asked)
    grads = torch.autograd.grad((found.transpose(1, 2).float() * weight).sum(), inputs)
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in [(found.transpose(1, 2), wanted), *zip(grads, expected)]:
        assert (ours.float() - theirs.float()).norm() <= bound * theirs.float().norm()


def test_the_compiler_takes_it_as_it_is() -> None:
    starts = make_starts(LENGTHS[:1])
    offsets = torch.from_numpy(find_offsets(starts))
    torch.library.opcheck(
        torch.ops.layerplan.segmented_attention,
        (*(torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)), offsets, 0.25, 0),
    )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"softcap": 50.0}, "asks for softcap"),
        ({"s_aux": torch.zeros(4)}, "asks for s_aux"),
        ({"indices": torch.zeros(4)}, "asks for indices"),
        ({"dropout": 0.1}, "asks for dropout"),
        ({"is_causal": False}, "also looks at later tokens"),
        ({OFFSETS: None}, "does not hand down where documents start"),
    ],
)
def test_what_a_layer_asks_beyond_documents_and_windows_is_refused(asked: dict[str, object], words: str) -> None:
    query = torch.zeros(1, 4, 64, 16)
    offsets = torch.from_numpy(find_offsets(make_starts(LENGTHS[:1])))
    with pytest.raises(UnservedAttentionError, match=words):
        attend_segmented(nn.Module(), query, query, query, None, **{OFFSETS: offsets} | asked)
    with pytest.raises(UnservedAttentionError, match="brings a mask of its own"):
        attend_segmented(nn.Module(), query, query, query, torch.ones(1), **{OFFSETS: offsets})


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "starcoder2", "olmo3", "cohere2", "exaone4", "qwen3"])
def test_a_packed_row_costs_its_documents_and_gives_what_they_give_alone(family: str) -> None:
    """Loss and every gradient, against the model's own logits of one document at a time."""
    model = build_family(family)
    check_packed(model, SEGMENTED, LENGTHS[0])


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("qwen3", None),
        ("mistral", None),
        ("gemma2", "asks for softcap"),
        ("codegen", "has attention of its own"),
        ("llama4_text", "a loss of"),
    ],
)
def test_the_model_says_whether_its_documents_can_be_read_one_by_one(family: str, fault: str | None) -> None:
    """Gemma 2 caps scores, CodeGen has its own code, Llama 4 looks at chunks of eight; attention is left as it was."""
    model = build_family(family)
    before = model.config._attn_implementation
    found = find_document_fault(model, LossRecipe(), "segmented", seq_len=64)
    assert found is None if fault is None else fault in (found or "")
    assert model.config._attn_implementation == before and not model.training


@pytest.mark.parametrize(
    ("attention", "recipe", "fault", "words"),
    [
        (
            "varlen",
            LossRecipe(),
            None,
            "it is for GPUs, this worker computes on a cpu; train.attention=auto takes another",
        ),
        ("segmented", LossRecipe(attention="eager"), None, "the model needs its own attention"),
        ("segmented", LossRecipe(), "X asks for softcap", "train.attention=segmented: X asks for softcap"),
    ],
)
def test_attention_that_device_or_model_lack_is_refused(
    attention: str, recipe: LossRecipe, fault: str | None, words: str
) -> None:
    config = TrainConfig.model_validate({"attention": attention})
    shape = ModelShape.from_hf_config(TINY_QWEN3 | {"max_position_embeddings": 64})
    with pytest.raises(TrainingError, match=words):
        choose_attention(config, shape, 64, torch.device("cpu"), recipe, lambda name: fault)
    assert choose_attention(TrainConfig(), shape, 64, torch.device("cpu"), LossRecipe()) == "sdpa"
