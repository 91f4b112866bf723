"""FlexAttention that reads each document of packed rows alone: blocks of 128 by 128 pairs in which nothing is seen are left out.

On Hopper it is faster than the flash kernel over documents (`varlen`), and its inputs have the same sizes whatever the
documents are, so that compiled layers are compiled once. Rows of one document go to the plain causal kernel. Which blocks are
looked into is computed on the device from the positions, and nobody waits for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from layerplan.train.document_attention import UnservedAttentionError, attend_whole, read_request

FLEX = "layerplan_flex"
BLOCK = 128
"""Queries and keys of a block, which is what PyTorch's kernels take unless told otherwise."""
Masks = dict[int | None, BlockMask]
"""From a layer's window, None where it sees the whole document, to its mask."""


def register() -> None:
    """Makes the implementation known to `transformers`; may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLEX, attend_flex)


def attends_by_blocks(model: nn.Module) -> bool:
    """Whether it is the attention set in a `transformers` model."""
    return getattr(model.config, "_attn_implementation", None) == FLEX


def find_windows(model: nn.Module) -> frozenset[int]:
    """Windows that some layer's attention hands over, its own or its config's."""
    owners = [owner for module in model.modules() for owner in (module, getattr(module, "config", None))]
    found = (getattr(owner, "sliding_window", None) for owner in owners)
    return frozenset(window for window in found if isinstance(window, int))


def make_masks(
    position_ids_BT: Tensor | None, size: tuple[int, ...], windows: Iterable[int], device: torch.device
) -> Masks | None:
    """What every kind of layer sees of packed rows; None where rows are one document each and no window ends inside them.

    Args:
        position_ids_BT: They restart at every document; None where every row is one. Each token that pads may be a document.
        size: Rows and tokens per row.
        windows: Of the layers (`find_windows`).
        device: Of the rows.
    """
    inside = [window for window in windows if window < size[1]]
    if position_ids_BT is not None:
        return {window: make_mask(position_ids_BT, window) for window in (None, *inside)}
    if not inside:
        return None
    whole_BT = torch.arange(size[1], device=device).expand(size)
    return {window: make_mask(whole_BT, window) for window in inside}


def make_mask(position_ids_BT: Tensor, window: int | None) -> BlockMask:
    """Blocks by what a query sees, which is one stretch of keys: from its document's start, or its window's, to itself.

    The stretch of a later query of a row never begins earlier. So a block of keys is seen whole by a block of queries
    when it lies before them and the last of them sees its first key; and not at all when the first of them, whose stretch
    begins earliest, sees none of it.
    """
    seq_len = position_ids_BT.shape[1]
    places_T = torch.arange(seq_len, device=position_ids_BT.device)
    first_BT = places_T - position_ids_BT
    if window is not None:
        first_BT = torch.maximum(first_BT, places_T - (window - 1))
    num_blocks = -(-seq_len // BLOCK)
    blocks_K = torch.arange(num_blocks, device=first_BT.device)
    last_Q = ((blocks_K + 1) * BLOCK - 1).clamp(max=seq_len - 1)
    earliest_BQ1, latest_BQ1 = first_BT[:, ::BLOCK, None], first_BT[:, last_Q, None]
    is_before_QK = blocks_K < blocks_K[:, None]
    is_seen_BQK = (blocks_K >= earliest_BQ1 // BLOCK) & (blocks_K <= blocks_K[:, None])
    is_whole_BQK = is_seen_BQK & is_before_QK & (blocks_K * BLOCK >= latest_BQ1)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_BT[row, query])

    return BlockMask.from_kv_blocks(
        *_list_blocks(is_seen_BQK & ~is_whole_BQK),
        *_list_blocks(is_whole_BQK),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(seq_len, seq_len),
    )


def _list_blocks(is_chosen_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """Of each block of queries how many blocks of keys are chosen, (B, 1, Q), and which, these first: (B, 1, Q, K)."""
    order_BQK = is_chosen_BQK.int().argsort(dim=-1, descending=True, stable=True)
    return is_chosen_BQK.sum(-1, dtype=torch.int32)[:, None], order_BQK.int()[:, None]


def attend_flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """Attention of (B, H, T, D) queries within documents; returns (B, T, H, D).

    Raises:
        UnservedAttentionError: When the layer asks for more, or for a window that it does not name as its own.
    """
    masks, scale, window = read_request(module, query, attention_mask, asked)
    mask = None if masks is None else masks.get(window)
    if mask is None:
        if window is not None or (masks is not None and None in masks):
            raise UnservedAttentionError(f"{type(module).__name__} asks for a window of {window} that no layer names")
        return attend_whole(query, key, value, scale), None
    if query.shape[1] & (query.shape[1] - 1):  # as transformers does; the kernel groups heads by powers of two
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    attend = flex_attention if torch.compiler.is_compiling() or query.device.type == "cpu" else _compiled_kernel()
    output = attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it nothing is compiled, and PyTorch's words on what that costs its flexible attention are left out."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        yield


@cache
def _compiled_kernel() -> Any:
    return torch.compile(flex_attention)


register()
