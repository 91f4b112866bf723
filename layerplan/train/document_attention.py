"""Attention that reads each document of packed rows alone, at a cost of the sum of their squared lengths.

Two implementations under `transformers`' attention interface, to be named like its own. No mask is made for them: where
documents start is given beside the tokens (`document_offsets`), and windows are those that layers pass along. What a layer
asks beyond that (capped scores, sinks, its own mask) is refused, so that a model that needs it is found out by asking it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

VARLEN = "layerplan_varlen"
"""PyTorch's flash kernel over documents of any length; GPUs, bfloat16 and float16."""
SEGMENTED = "layerplan_segmented"
"""PyTorch's causal kernel for CPUs, a document at a time."""
OFFSETS = "document_offsets"
"""The keyword argument models hand down to their layers: where documents start, what `flex` made of that, or `WHOLE_ROWS`."""
WHOLE_ROWS = "whole rows"
"""In place of offsets: every row is one document, and the plain causal kernel runs."""
MIN_OFFSETS = 16
"""Offsets are padded to this number or a power of two above it, so that compiled layers see few sizes."""


class UnservedAttentionError(RuntimeError):
    """A layer asks for more than attention within documents and windows."""


def register() -> None:
    """Makes both implementations known to `transformers`; may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, attend_varlen)
    AttentionInterface.register(SEGMENTED, attend_segmented)


def attends_by_document(model: nn.Module) -> bool:
    """Whether the attention set in a `transformers` model is one of these."""
    return getattr(model.config, "_attn_implementation", None) in (VARLEN, SEGMENTED)


def find_offsets(is_start_BT: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Where documents start in the flattened rows, then the number of tokens, repeated: (K,) int32.

    Args:
        is_start_BT: True at the first token of each document; the first of a row always is one.
    """
    starts = is_start_BT.copy()
    starts[:, 0] = True
    found = np.flatnonzero(starts)
    size = MIN_OFFSETS
    while size < len(found) + 1:
        size *= 2
    offsets = np.full(size, starts.size, dtype=np.int32)
    offsets[: len(found)] = found
    return offsets


def attend_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """Attention of (B, H, T, D) queries within documents; returns (B, T, H, D).

    Raises:
        UnservedAttentionError: When the layer asks for more.
    """
    from torch.nn.attention.varlen import varlen_attn

    offsets, scale, window = read_request(module, query, attention_mask, asked)
    num_rows, _, seq_len, _ = query.shape
    if offsets is None:
        if window is None:
            return attend_whole(query, key, value, scale), None
        offsets = torch.arange(0, num_rows * seq_len + 1, seq_len, dtype=torch.int32, device=query.device)
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    left = -1 if window is None else window - 1
    output = varlen_attn(*flat, offsets, offsets, seq_len, seq_len, scale=scale, window_size=(left, 0), enable_gqa=True)
    return output.unflatten(0, (num_rows, seq_len)), None


def attend_segmented(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """As `attend_varlen`, on a CPU, in any floating dtype."""
    offsets, scale, window = read_request(module, query, attention_mask, asked)
    num_rows, _, seq_len, _ = query.shape
    if offsets is None:
        if window is None:
            return attend_whole(query, key, value, scale), None
        offsets = torch.arange(0, num_rows * seq_len + 1, seq_len, dtype=torch.int32)
    output, _ = torch.ops.layerplan.segmented_attention(query, key, value, offsets, scale, window or 0)
    return output.transpose(1, 2), None


def attend_whole(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention where every row is one document; (B, T, H, D)."""
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


def refuse_more(module: nn.Module, asked: dict[str, Any], *served: str) -> None:
    """Raises `UnservedAttentionError` when a layer hands over a tensor that would be ignored, such as which keys it chose."""
    for name, value in asked.items():
        if isinstance(value, Tensor) and name not in ("position_ids", "cache_position", *served):
            raise UnservedAttentionError(f"{type(module).__name__} asks for {name}")


def read_request(
    module: nn.Module, query: Tensor, attention_mask: Tensor | None, asked: dict[str, Any]
) -> tuple[Any, float, int | None]:
    """Offsets or whatever was handed down (None: whole rows), scale and window (None: none that matters).

    Raises:
        UnservedAttentionError: When the layer asks for more.
    """
    offsets, window = asked.get(OFFSETS), asked.get("sliding_window")
    if window is not None and window >= query.shape[2]:
        window = None
    if offsets is None:
        raise UnservedAttentionError(f"{type(module).__name__} does not hand down where documents start")
    if attention_mask is not None:
        raise UnservedAttentionError(f"{type(module).__name__} brings a mask of its own")
    if asked.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnservedAttentionError(f"{type(module).__name__} also looks at later tokens")
    refuse_more(module, asked, OFFSETS)
    for name in ("softcap", "dropout"):
        if asked.get(name) is not None and not (name == "dropout" and asked[name] == 0.0):
            raise UnservedAttentionError(f"{type(module).__name__} asks for {name}")
    scale = asked.get("scaling")
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    return None if isinstance(offsets, str) else offsets, scale, window


@torch.library.custom_op("layerplan::segmented_attention", mutates_args=())
def _segmented_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and the log-sum-exp of the scores (B, H, T); a window of 0 is none."""
    output, log_sum_BHT = _make_outputs(query)
    for row, piece in _list_documents(offsets, query.shape[2]):
        inputs = _cut(query, key, value, row, piece)
        found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *inputs, 0.0, window == 0, attn_mask=_make_window(piece, window, query), scale=scale
        )
        output[row, :, piece] = found[0]
        log_sum_BHT[row, :, piece] = log_sum[0]
    return output, log_sum_BHT


@_segmented_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor]:
    return _make_outputs(query)


@torch.library.custom_op("layerplan::segmented_attention_backward", mutates_args=())
def _segmented_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_BHT: Tensor,
    offsets: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.zeros_like(each) for each in (query, key, value)]
    for row, piece in _list_documents(offsets, query.shape[2]):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[row : row + 1, :, piece],
            *_cut(query, key, value, row, piece),
            output[row : row + 1, :, piece],
            log_sum_BHT[row : row + 1, :, piece],
            0.0,
            window == 0,
            attn_mask=_make_window(piece, window, query),
            scale=scale,
        )
        for whole, part in zip(grads, found):
            whole[row, :, piece] = _add_groups(part[0], whole.shape[1])
    return grads[0], grads[1], grads[2]


@_segmented_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, scale, window = inputs
    ctx.save_for_backward(query, key, value, *output, offsets)
    ctx.settings = scale, window


def _backward(ctx: Any, grad: Tensor, grad_log_sum: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, offsets = ctx.saved_tensors
    grads = torch.ops.layerplan.segmented_attention_backward(grad, *tensors, offsets, *ctx.settings)
    return *grads, None, None, None


_segmented_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _make_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Laid out by token, as the layer goes on with them."""
    num_rows, num_heads, seq_len, width = query.shape
    output = query.new_empty(num_rows, seq_len, num_heads, width).transpose(1, 2)
    return output, query.new_empty(num_rows, num_heads, seq_len, dtype=torch.float32)


def _list_documents(offsets: Tensor, seq_len: int) -> list[tuple[int, slice]]:
    """(row, positions in it) of each document that has tokens; a document never goes on in another row."""
    bounds = offsets.numpy().tolist()
    return [
        (start // seq_len, slice(start % seq_len, start % seq_len + stop - start))
        for start, stop in pairwise(bounds)
        if stop > start
    ]


def _cut(query: Tensor, key: Tensor, value: Tensor, row: int, piece: slice) -> list[Tensor]:
    """One document's (1, H, t, D), keys and values repeated for the heads that share them."""
    groups = query.shape[1] // key.shape[1]
    shared = [each[row : row + 1, :, piece] for each in (key, value)]
    repeated = [each if groups == 1 else each.repeat_interleave(groups, dim=1) for each in shared]
    return [query[row : row + 1, :, piece], *repeated]


def _add_groups(grad_HTD: Tensor, num_heads: int) -> Tensor:
    """The gradients of repeated heads, summed."""
    if len(grad_HTD) == num_heads:
        return grad_HTD
    return grad_HTD.unflatten(0, (num_heads, -1)).sum(1)


def _make_window(piece: slice, window: int, like: Tensor) -> Tensor | None:
    """What is added to scores where only the last `window` tokens are seen; None where every earlier one is."""
    if window == 0:
        return None
    places = torch.arange(piece.stop - piece.start)
    distance = places[:, None] - places[None, :]
    is_seen = (distance >= 0) & (distance < window)
    return torch.zeros(is_seen.shape, dtype=like.dtype).masked_fill_(~is_seen, float("-inf"))


register()
