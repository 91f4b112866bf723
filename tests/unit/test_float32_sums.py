"""Gradients that PyTorch sums in bfloat16 on a CPU, against float64: its own stop growing after 256 equal terms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from layerplan.train.float32_sums import sum_in_float32


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
    """The gradient node is PyTorch's own, or there is none."""
    embedding = nn.Embedding(5, 4).to(dtype)
    embedding.weight.requires_grad_(dtype == torch.float32)
    sum_in_float32([embedding])
    found = embedding(torch.tensor([1])).grad_fn
    assert found is None if dtype == torch.bfloat16 else type(found).__name__ == "EmbeddingBackward0"


class Normed(nn.Module):
    """As Nemotron does it: no module of PyTorch's, and a weight about zero."""

    def __init__(self, with_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32) * 0.1)
        self.bias = nn.Parameter(torch.randn(32)) if with_bias else None

    def forward(self, given: Tensor) -> Tensor:
        return nn.functional.layer_norm(given, (32,), self.weight + 1, self.bias, 1e-5)


@pytest.mark.parametrize("kind", [lambda bias: nn.LayerNorm(32, bias=bias), Normed])
@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norms_have_their_whole_gradient(kind: Callable[[bool], nn.Module], with_bias: bool) -> None:
    torch.manual_seed(0)
    ours = kind(with_bias).bfloat16()
    exact = copy.deepcopy(ours).double()
    given, grad = torch.randn(16, 1024, 32).bfloat16(), torch.randn(16, 1024, 32).bfloat16() + 0.3
    inputs = [given.double().requires_grad_(), given.clone().requires_grad_(), given.clone().requires_grad_()]
    exact(inputs[0]).backward(grad.double())
    before = ours(inputs[1])
    sum_in_float32([ours])
    after = ours(inputs[2])
    assert torch.equal(before, after)
    after.backward(grad)
    assert relative_error(inputs[2].grad, inputs[0].grad) < 1e-2
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, exact.get_parameter(name).grad) < 5e-3, name


def test_rows_looked_up_by_index_have_their_whole_gradient() -> None:
    """As experts look up their biases."""
    torch.manual_seed(0)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(4, 16))

        def forward(self, given: Tensor, chosen: Tensor) -> Tensor:
            return given + self.bias[chosen]

    ours = Experts().bfloat16()
    chosen, grad = torch.randint(0, 4, (4000,)), torch.randn(4000, 16).bfloat16() + 0.3
    sum_in_float32([ours])
    ours(torch.zeros(4000, 16, dtype=torch.bfloat16), chosen).backward(grad)
    exact = torch.zeros(4, 16, dtype=torch.float64).index_add_(0, chosen, grad.double())
    assert relative_error(ours.bias.grad, exact) < 3e-3
