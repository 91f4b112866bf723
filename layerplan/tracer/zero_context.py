"""Attention of the query's rows over keys that are zero in front of them, as a transformers attention function.

A zero key gives every query the logit 0 and its value adds nothing: it only takes a share of the softmax. The model's
own code still makes queries, keys, values and rotary angles; this function replaces the core of its attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION_NAME = "layerplan_zero_context"


@contextmanager
def attending_to_zeros(model: nn.Module, num_zeros: int) -> Iterator[None]:
    """Runs the model's attention as if `num_zeros` positions with zero keys and values came before its input.

    Raises:
        ValueError: From the model's forward pass, when a sliding window would hide some of those positions.
    """
    from transformers import AttentionInterface

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if sliding_window is not None and sliding_window < num_zeros + key.shape[-2]:
            raise ValueError(f"a sliding window of {sliding_window} hides part of the context")
        return attend_after_zeros(query, key, value, num_zeros, scaling=scaling, softcap=softcap), None

    AttentionInterface.register(ATTENTION_NAME, attend)
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    kept = {name: config._attn_implementation for name, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = ATTENTION_NAME
        yield
    finally:
        for name, config in configs.items():
            config._attn_implementation_internal = kept[name]


def attend_after_zeros(
    query: Tensor, key: Tensor, value: Tensor, num_zeros: int, *, scaling: float | None, softcap: float | None
) -> Tensor:
    """Causal attention over the keys and `num_zeros` zero keys before them.

    Args:
        query: (rows, heads, Q, head_dim).
        key: (rows, key-value heads, Q, head_dim); each serves heads / key-value heads consecutive heads.
        value: Like key.
        num_zeros: Positions before the first one whose key and value are zero.
        scaling: Factor of the logits; 1 / sqrt(head_dim) when None.
        softcap: Logits are softcap * tanh(logits / softcap) when given.

    Returns:
        (rows, Q, heads, head_dim), as transformers expects it.
    """
    rows, heads, length, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, length, width)
    logits = grouped @ key[:, :, None].transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    logits = logits.masked_fill(future, float("-inf"))
    weights = torch.softmax(nn.functional.pad(logits, (num_zeros, 0)), -1)[..., num_zeros:]
    return (weights @ value[:, :, None]).reshape(rows, heads, length, -1).transpose(1, 2)
