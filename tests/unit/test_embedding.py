"""Gradients of embeddings in bfloat16 on a CPU against float64: PyTorch's own stop growing after 256 places of a token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from layerplan.train.embedding import sum_in_float32


class Scaled(nn.Embedding):
    """As Gemma looks up."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.to_dense().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("as_rows", [False, True])
def test_common_tokens_have_their_whole_gradient(kind: type[nn.Embedding], padding: int | None, as_rows: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (4, 2000))
    ids[0] = 0
    grad = torch.randn(4, 2000, 16).bfloat16() + 0.3
    exact = kind(9, 16, padding_idx=padding).double()
    ours = kind(9, 16, padding_idx=padding).bfloat16()
    exact(ids).backward(grad.double())
    ours(ids).backward(grad)
    assert relative_error(ours.weight.grad, exact.weight.grad) > 0.1  # what there would be no need for this without
    ours.weight.grad = None
    sum_in_float32([ours], added_to=ours.weight if as_rows else exact.weight)
    assert torch.equal(ours(ids), kind.forward(ours, ids))
    ours(ids).backward(grad)
    assert ours.weight.grad.is_sparse == as_rows
    assert relative_error(ours.weight.grad, exact.weight.grad) < 3e-3


def test_rows_are_added_to_a_heads_gradient() -> None:
    """A tied matrix gets its dense gradient from the head and rows from the lookup."""
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 300))
    exact, ours = nn.Embedding(50, 8).double(), nn.Embedding(50, 8).bfloat16()
    exact.weight.data = ours.weight.data.double()
    sum_in_float32([ours], added_to=ours.weight)
    for embedding in (exact, ours):
        states = torch.tanh(embedding(ids))
        (states @ embedding.weight.T).logsumexp(-1).sum().backward()
    assert not ours.weight.grad.is_sparse
    assert relative_error(ours.weight.grad, exact.weight.grad) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_and_frozen_embeddings_are_left_alone(dtype: torch.dtype) -> None:
    embedding = nn.Embedding(5, 4).to(dtype)
    embedding.weight.requires_grad_(dtype == torch.float32)
    sum_in_float32([embedding])
    assert "forward" not in vars(embedding)
