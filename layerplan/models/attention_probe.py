"""An attention implementation that computes nothing of use and writes down what it was asked for.

Registered with transformers beside its own, it is called by every model that lets its attention be chosen, with the
queries, keys and values of the layer at hand. The mask it is handed was made by our mask function, which asks the
model's own mask rule, per kind of layer, which keys a query may read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "layerplan_probe"


@dataclass(frozen=True)
class KeyRule:
    """Which keys a query reads: all before it, the last `window`, or those since its chunk began."""

    window: int | None = None
    is_chunked: bool = False


@dataclass(frozen=True)
class AttentionCall:
    """One call of a layer's attention."""

    module: nn.Module
    num_heads: int
    num_key_value_heads: int
    query_head_dim: int
    value_head_dim: int
    rule: KeyRule


calls: list[AttentionCall] = []
"""Calls since the list was last cleared."""
on_call: Callable[[], None] | None = None
"""Told of every call."""
on_attend: Callable[..., Tensor] | None = None
"""Attends in place of the probe: module, query, key, value, mask and what else was asked, to (B, H, T, D)."""


def register() -> None:
    """Makes the implementation known to transformers; again and again is the same as once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention without a mask, of the cost and shapes of the eager one."""
    if on_attend is not None:
        return on_attend(module, query, key, value, attention_mask, asked).transpose(1, 2).contiguous(), None
    rule = getattr(attention_mask, "key_rule", KeyRule())
    heads, key_value_heads = query.shape[1], key.shape[1]
    calls.append(AttentionCall(module, heads, key_value_heads, query.shape[-1], value.shape[-1], rule))
    if on_call is not None:
        on_call()
    copies = heads // key_value_heads
    scores = query @ key.repeat_interleave(copies, 1).transpose(2, 3)
    weights = scores.softmax(-1).to(value.dtype)
    return (weights @ value.repeat_interleave(copies, 1)).transpose(1, 2).contiguous(), weights


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    device: Any = None,
    **_: Any,
) -> Tensor:
    """A mask without values that carries its rule."""
    mask = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)
    mask.key_rule = find_rule(mask_function, local_size)
    return mask


def find_rule(mask_function: Callable[..., Any], local_size: int | None) -> KeyRule:
    """Asks a mask function of transformers whether its window slides or stands.

    At twice its size a chunk begins, and the query there reads nothing before it. The start of a chunk may also depend
    on padding, which is a tensor of the model at hand and has no values here: then there is no answer.
    """
    if local_size is None:
        return KeyRule()
    query = torch.tensor(2 * local_size)
    try:
        reads_before = bool(mask_function(torch.tensor(0), torch.tensor(0), query, query - 1))
    except (RuntimeError, NotImplementedError):
        reads_before = False
    return KeyRule(local_size, is_chunked=not reads_before)
