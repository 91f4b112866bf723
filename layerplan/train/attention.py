"""Which attention runs on packed rows.

The masks are made by `transformers`, as each layer means them, from positions that restart. A row made of one document
needs none: the plain causal kernel runs. With several documents, `sdpa` takes a boolean mask, and `flex` (FlexAttention,
GPU) a block mask whose empty blocks are skipped, so cost falls with document length. `eager` spells the products out
for the compiler: on a CPU, over rows of 512, a whole training step took 0.89 of the step with PyTorch's CPU flash
kernel. A model whose own attention does more than those kernels, such as capping its scores, gets `eager` from its loss
recipe.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.config.train import TrainConfig
from layerplan.errors import first_line
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape

logger = logging.getLogger(__name__)

CPU_EAGER_TOKENS = 1024
"""Longest rows for which the compiled plain attention is chosen on a CPU."""
IMPLEMENTATIONS = {"sdpa": "sdpa", "flex": "flex_attention", "eager": "eager"}
"""Our name to transformers' name."""


def choose_attention(
    config: TrainConfig, shape: ModelShape, seq_len: int, device: torch.device, recipe: LossRecipe
) -> str:
    """Returns `sdpa`, `flex` or `eager`: what the model needs, what the config says, or the faster one on a GPU."""
    if recipe.attention == "eager":
        return "eager"
    if config.attention != "auto":
        return config.attention
    if device.type != "cuda":
        return "eager" if config.compile and seq_len <= CPU_EAGER_TOKENS else "sdpa"
    seconds = {}
    for name in ("sdpa", "flex"):
        try:
            seconds[name] = time_attention(name, shape, seq_len, config.micro_batch_size, device)
        except (RuntimeError, ImportError) as error:
            logger.info("attention %s cannot run here: %s", name, str(error).splitlines()[0])
    return min(seconds, key=lambda name: seconds[name], default="sdpa")


def time_attention(name: str, shape: ModelShape, seq_len: int, num_rows: int, device: torch.device) -> float:
    """Seconds of one forward and backward pass over rows of four documents, the best of five."""
    document_ids = (torch.arange(seq_len, device=device) * 4 // seq_len).expand(num_rows, seq_len)
    mask = _make_mask(document_ids, name)

    def random(num_heads: int) -> Tensor:
        size = (num_rows, num_heads, seq_len, shape.head_dim)
        return torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)

    query, key, value = (
        random(count) for count in (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    )
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        _attend(name, query, key, value, mask).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _make_mask(document_ids_BT: Tensor, name: str) -> Any:
    """True where a query may see a key: same document, not later."""
    if name == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (document_ids_BT[batch, query] == document_ids_BT[batch, key])

        num_rows, seq_len = document_ids_BT.shape
        return create_block_mask(allowed, num_rows, None, seq_len, seq_len, device=document_ids_BT.device)
    return torch.tril(document_ids_BT[:, :, None] == document_ids_BT[:, None, :])[:, None]


def _attend(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    if name == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        output: Tensor = torch.compile(flex_attention)(query, key, value, block_mask=mask, enable_gqa=True)
        return output
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def set_attention(model: nn.Module, name: str) -> None:
    """Sets transformers' attention implementation.

    Raises:
        ValueError: When the model does not have it.
    """
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"no {name} attention: {first_line(error)}") from None


def try_set_attention(model: nn.Module, name: str) -> None:
    """As `set_attention`; a model that cannot be told keeps its own code."""
    with suppress(ValueError):
        set_attention(model, name)
