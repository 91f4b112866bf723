"""Experts as training runs them, on tensors without memory.

Transformers multiplies the tokens of all experts at once (`grouped_mm`), which keeps what each expert is given and gives back.
To count FLOPs each token's matrices are gathered (`batched_mm`), which the counter can read; nobody trains like that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "layerplan_probe"

_is_grouped = False


def register() -> None:
    """Makes the implementation known to transformers; again and again is the same as once.

    Raises:
        ImportError: When transformers has no choice of experts.
    """
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, run_experts)


@contextmanager
def grouped() -> Iterator[None]:
    """Experts keep what training keeps."""
    global _is_grouped
    _is_grouped = True
    try:
        yield
    finally:
        _is_grouped = False


def run_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of (tokens, width) states, by indices and weights of (tokens, experts of a token)."""
    if _is_grouped:
        return _run_grouped(module, hidden_states, top_k_index, top_k_weights)
    from transformers.integrations.moe import batched_mm_experts_forward

    output: Tensor = batched_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return output


def _run_grouped(module: Any, states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    num_tokens, copies = index.shape
    experts, order = index.reshape(-1).sort()
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _multiply(module, first, states[order // copies], experts)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = _multiply(module, "down_proj", inner, experts) * weights.reshape(-1)[order].unsqueeze(-1)
    outputs = outputs[torch.empty_like(order)].view(num_tokens, copies, -1).sum(1)
    return outputs.to(states.dtype)


def _multiply(module: nn.Module, name: str, given: Tensor, experts: Tensor) -> Tensor:
    matrices = getattr(module, name)
    output: Tensor = _GroupedProduct.apply(given.to(matrices.dtype), matrices, bool(module.is_transposed))
    return output + getattr(module, f"{name}_bias")[experts] if module.has_bias else output


class _GroupedProduct(torch.autograd.Function):
    """A product of no values; a matrix that trains keeps its input."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, matrices: Tensor, is_transposed: bool) -> Tensor:
        """(S, in) by stacked matrices to (S, out)."""
        ctx.save_for_backward(*([given] if ctx.needs_input_grad[1] else []), matrices)
        return given.new_empty(len(given), matrices.shape[-1 if is_transposed else -2])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """There are no values."""
        raise NotImplementedError("experts that only count have no gradients")
