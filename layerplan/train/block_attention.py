"""Plain attention for the compiler, in blocks of queries that see no key after their end.

The products are those of `eager` less what lies above the diagonal, up to half of them, and heads that share keys and
values are one product. Masks are those that `transformers` makes for `eager`; a model that looks at later tokens does not
get here (`layerplan/train/self_test.py`). What a layer asks beyond a mask is left to PyTorch's own attention, or refused
where that ignores it too: a model is asked beforehand (`find_blocks_fault` in `layerplan/train/loss_proof.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerplan.plan.attention import BLOCK_TOKENS
from layerplan.train.document_attention import UnservedAttentionError, refuse_more

BLOCKS = "layerplan_blocks"
ASKS_FOR_CAP = "caps its scores"
"""What a layer does that is refused, after its name."""


def register() -> None:
    """Makes the implementation and its masks known to `transformers`; may be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(BLOCKS, attend_blocks)
    AttentionMaskInterface.register(BLOCKS, eager_mask)


def attend_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """Causal attention of (B, H, T, D) queries under an added mask (B or 1, 1 or H, T, T); returns (B, T, H, D).

    Raises:
        UnservedAttentionError: When the layer hands over more than PyTorch's attention would read.
    """
    refuse_more(module, asked, "position_bias")
    if asked.get("softcap"):
        raise UnservedAttentionError(f"{type(module).__name__} {ASKS_FOR_CAP}")
    if not _serves(module, query, key, attention_mask, asked):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **asked)
        return output, None
    assert attention_mask is not None
    scale = asked.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shared = query.shape[1] // key.shape[1]
    # of several rows, each block's product would keep a copy of the keys before it
    key, value = key.contiguous(), value.contiguous()
    outputs = []
    for start in range(0, query.shape[2], BLOCK_TOKENS):
        block = query[:, :, start : start + BLOCK_TOKENS]
        size = block.shape[2]
        stop = start + size
        joined = block.unflatten(1, (-1, shared)).flatten(2, 3)
        scores = (joined @ key[:, :, :stop].transpose(2, 3)).unflatten(2, (shared, size)).flatten(1, 2)
        scores = scores * scale + attention_mask[:, :, start:stop, :stop]
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        found = weights.unflatten(1, (-1, shared)).flatten(2, 3) @ value[:, :, :stop]
        outputs.append(found.unflatten(2, (shared, size)).flatten(1, 2))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _serves(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, asked: dict[str, Any]
) -> bool:
    is_causal = asked.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return (
        bool(is_causal)
        and attention_mask is not None
        and attention_mask.is_floating_point()
        and query.shape[2] == key.shape[2] == attention_mask.shape[-1]
        and asked.get("position_bias") is None
        and not (asked.get("dropout") and module.training)
    )


register()
