"""What a model says of three documents, each alone: transformers' own code, eager attention, nothing of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LENGTHS = (20, 30, 14)
FIRST_ID = 4
"""Ids below are special tokens of one family or another."""


def make_documents(vocab_size: int = 128) -> list[Tensor]:
    """Three documents of 20, 30 and 14 random tokens, each (1, T)."""
    random = torch.Generator().manual_seed(5)
    return [torch.randint(FIRST_ID, vocab_size, (1, length), generator=random) for length in LENGTHS]


def run_alone(model: Any, document: Tensor, **options: Any) -> Any:
    """The model's output for one document, without a cache where it has one."""
    try:
        return model(input_ids=document, use_cache=False, **options)
    except TypeError as error:
        if "use_cache" not in str(error):
            raise
        return model(input_ids=document, **options)


def compute_loss(model: nn.Module, documents: list[Tensor]) -> Tensor:
    """Sum of the next-token losses of every document, from its float32 logits."""
    losses = []
    for document in documents:
        logits = run_alone(model, document).logits.float()
        losses.append(nn.functional.cross_entropy(logits[0, :-1], document[0, 1:], reduction="sum"))
    return torch.stack(losses).sum()


def compute_own_loss(model: nn.Module, documents: list[Tensor]) -> Tensor:
    """The same as the class computes it from `labels`, its mean times the number of labels."""
    losses = [run_alone(model, each, labels=each).loss * (each.shape[1] - 1) for each in documents]
    return torch.stack(losses).sum()


def compute_gradients(model: nn.Module, documents: list[Tensor]) -> dict[str, Tensor]:
    """Gradient of `compute_loss` of every parameter that it depends on."""
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    grads = torch.autograd.grad(compute_loss(model, documents), list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads) if grad is not None}


@torch.no_grad()
def measure_leak(model: nn.Module, document: Tensor) -> float:
    """Largest change of a logit before a token when that token is replaced; 0 for a causal model."""
    changed = document.clone()
    position = document.shape[1] * 2 // 3
    changed[0, position] = FIRST_ID + (changed[0, position] + 1 - FIRST_ID) % (int(document.max()) - FIRST_ID)
    before, after = (run_alone(model, each).logits[0, :position] for each in (document, changed))
    return float((before - after).abs().max())


def use_eager(model: Any) -> None:
    """Spelled-out attention, where the class lets it be chosen."""
    try:
        model.set_attn_implementation("eager")
    except (ValueError, AttributeError, NotImplementedError):
        return
