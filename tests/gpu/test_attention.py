"""Every attention backend on packed rows, against documents alone in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from layerplan.corpus.rows import PackedRows
from layerplan.train.attention import IMPLEMENTATIONS
from layerplan.train.document_attention import OFFSETS, attend_segmented, attend_varlen, find_offsets
from layerplan.train.flex_documents import attend_flex, make_masks
from layerplan.train.step import LossModel, make_batch
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.small_families import build_family

LENGTHS = [[200, 300, 12], [512], [1, 255, 256]]
WIDE = {"head_dim": 64, "hidden_size": 128, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 512}
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of the relative difference: 2**-8 is the rounding of bfloat16."""


def name_backends(device: torch.device) -> dict[str, torch.dtype]:
    if device.type == "cpu":
        return {"eager": torch.float32, "sdpa": torch.float32, "segmented": torch.float32}
    return dict.fromkeys(("eager", "sdpa", "flex", "varlen"), torch.bfloat16)


def make_starts() -> np.ndarray:
    starts = np.zeros((len(LENGTHS), 512), dtype=bool)
    for row, documents in enumerate(LENGTHS):
        starts[row, np.cumsum([0, *documents[:-1]])] = True
    return starts


def make_positions() -> np.ndarray:
    return np.stack([np.concatenate([np.arange(length) for length in row]) for row in LENGTHS])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_by_document_is_attention_under_a_mask(
    device: torch.device, window: int | None, heads: tuple[int, int]
) -> None:
    """Values and gradients against float32 products under the mask, spelled out."""
    starts = make_starts()
    documents = torch.from_numpy(np.cumsum(starts, axis=1))
    distance = torch.arange(512)[:, None] - torch.arange(512)[None, :]
    seen = (documents[:, :, None] == documents[:, None, :]) & (distance >= 0) & (distance < (window or 512))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    inputs = [
        torch.randn(3, count, 512, 64, device=device).to(dtype).requires_grad_() for count in (heads[0], *heads[1:] * 2)
    ]
    weight = torch.randn(3, heads[0], 512, 64, device=device)
    wanted = scaled_dot_product_attention(
        *(each.float() for each in inputs), attn_mask=seen[:, None].to(device), enable_gqa=True
    )
    expected = torch.autograd.grad((wanted * weight).sum(), inputs)
    offsets = torch.from_numpy(find_offsets(starts)).to(device)
    positions = torch.from_numpy(make_positions()).to(device)
    attends = {attend_segmented: offsets}
    if device.type == "cuda":
        attends = {attend_varlen: offsets, attend_flex: make_masks(positions, (3, 512), (100,), device)}
    for attend, marks in attends.items():
        found, _ = attend(nn.Module(), *inputs, None, **{"sliding_window": window, OFFSETS: marks})
        grads = torch.autograd.grad((found.transpose(1, 2).float() * weight).sum(), inputs)
        for ours, theirs in [(found.transpose(1, 2), wanted), *zip(grads, expected)]:
            assert (ours.float() - theirs.float()).norm() <= BOUNDS[dtype] * theirs.float().norm()


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_packed_rows_give_what_documents_alone_give_under_every_backend(device: torch.device, family: str) -> None:
    """Loss and gradient of the model under each backend, against the model's own logits of each document in float32."""
    model = (
        build_tiny_qwen3(**TINY_QWEN3 | WIDE)
        if family == "qwen3"
        else build_family("mistral", **WIDE, initializer_range=0.05)
    ).to(device)
    ids = np.random.default_rng(0).integers(3, 256, (3, 512), dtype=np.int32)
    starts = make_starts()
    documents = (np.cumsum(starts, axis=1) - 1).astype(np.int32)
    positions = make_positions().astype(np.int32)
    model.set_attn_implementation("eager")
    expected = torch.zeros((), device=device)
    for row, lengths in zip(ids, LENGTHS):
        for piece in np.split(row, np.cumsum(lengths)[:-1]):
            if len(piece) > 1:
                tokens = torch.from_numpy(piece.astype(np.int64)).to(device)
                logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
                expected = expected + cross_entropy(logits, tokens[1:], reduction="sum")
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    batch = make_batch(PackedRows(np.arange(3), ids, documents, positions), device)
    for name, dtype in name_backends(device).items():
        model.to(dtype).set_attn_implementation(IMPLEMENTATIONS[name])
        found = LossModel(model)(batch)
        grads = torch.autograd.grad(found, parameters)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=BOUNDS[dtype]), name
        difference = sum((ours.float() - theirs).square().sum() for ours, theirs in zip(grads, wanted))
        norm = sum(theirs.square().sum() for theirs in wanted)
        assert float((difference / norm).sqrt()) <= 4 * BOUNDS[dtype], name
