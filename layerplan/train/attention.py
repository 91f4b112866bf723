"""Which attention runs on packed rows.

`varlen` (GPU) and `segmented` (CPU) read each document alone, at a cost of the sum of their squared lengths, and take no
mask (`layerplan/train/document_attention.py`). For the others masks are made by `transformers`, as each layer means them,
from positions that restart: `sdpa` takes a boolean one, `flex` (FlexAttention, GPU) a block mask whose empty blocks are
skipped. A row made of one document needs none: the plain causal kernel runs. `eager` and `blocks`
(`layerplan/train/block_attention.py`) spell the products out for the compiler, which on a CPU beats PyTorch's flash kernel
for rows of up to 1,024. `blocks` leaves out what lies above the diagonal, and rounds otherwise, so that it is chosen in
bfloat16 alone. A model whose own attention does more than those kernels, such as capping its scores, gets `eager` from its
loss recipe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from layerplan.config.train import TrainConfig
from layerplan.errors import TrainingError, first_line
from layerplan.plan.attention import CAUSAL, expect_attention
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape
from layerplan.train.block_attention import BLOCKS, attend_blocks
from layerplan.train.document_attention import (
    OFFSETS,
    SEGMENTED,
    VARLEN,
    attend_segmented,
    attend_varlen,
    find_offsets,
)

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "sdpa": "sdpa",
    "flex": "flex_attention",
    "eager": "eager",
    "varlen": VARLEN,
    "segmented": SEGMENTED,
    "blocks": BLOCKS,
}
"""Our name to transformers' name."""
BY_DOCUMENT = {"varlen": "cuda", "segmented": "cpu"}
"""Those that read each document alone, and the device they are for."""


def choose_attention(
    config: TrainConfig,
    shape: ModelShape,
    seq_len: int,
    device: torch.device,
    recipe: LossRecipe,
    find_fault: Callable[[], str | None] = lambda: None,
    find_blocks_fault: Callable[[], str | None] = lambda: None,
) -> str:
    """Returns a name of `IMPLEMENTATIONS`: what the model needs, what the config says, or the fastest one on a GPU.

    Args:
        config: Training section.
        shape: Sizes of the model.
        seq_len: Tokens per row.
        device: Where training runs.
        recipe: How the model's loss is computed.
        find_fault: Asks the model why its documents cannot be read one by one; None when they can.
        find_blocks_fault: Asks the model why its attention cannot be computed in blocks; None when it can.

    Raises:
        TrainingError: When the config names one that the device or the model does not have.
    """
    if config.attention in BY_DOCUMENT:
        _check_by_document(config, device, recipe, find_fault)
        return config.attention
    if recipe.attention == "eager":
        return "eager"
    if config.attention == "blocks":
        _refuse(config, find_blocks_fault())
    if config.attention != "auto":
        return config.attention
    if device.type != "cuda":
        expected = expect_attention(config, seq_len=seq_len, device_type=device.type, recipe=recipe)
        if expected != "blocks":  # neither is it a model's own, which was told above
            return "sdpa" if expected == CAUSAL else expected
        fault = find_blocks_fault()
        if fault is not None:
            logger.info("attention blocks does not serve this model: %s", fault)
        return "blocks" if fault is None else "eager"
    if recipe.rows == "whole":
        return "sdpa"
    return _choose_fastest(config, shape, seq_len, device, find_fault)


def asks_for_documents(config: TrainConfig, device: torch.device, recipe: LossRecipe) -> bool:
    """Whether `choose_attention` may ask why documents cannot be read one by one; the same on every worker."""
    if config.attention in BY_DOCUMENT:
        return True
    is_open = config.attention == "auto" and recipe.attention != "eager" and recipe.rows != "whole"
    return is_open and device.type == "cuda" and config.compute_dtype != "float32"


def _check_by_document(
    config: TrainConfig, device: torch.device, recipe: LossRecipe, find_fault: Callable[[], str | None]
) -> None:
    where = BY_DOCUMENT[config.attention]
    fault = None
    if device.type != where:
        fault = f"it is for {where.upper().replace('CUDA', 'GPU')}s, this worker computes on a {device.type}"
    elif config.attention == "varlen" and config.compute_dtype == "float32":
        fault = "its kernel has no float32; use train.compute_dtype=bfloat16"
    elif recipe.attention == "eager":
        fault = "the model needs its own attention"
    _refuse(config, fault or find_fault())


def _refuse(config: TrainConfig, fault: str | None) -> None:
    if fault is not None:
        raise TrainingError(f"train.attention={config.attention}: {fault}; train.attention=auto takes another")


def _choose_fastest(
    config: TrainConfig, shape: ModelShape, seq_len: int, device: torch.device, find_fault: Callable[[], str | None]
) -> str:
    seconds = {}
    dtype = getattr(torch, config.compute_dtype)
    names = ["sdpa", "flex"] + ["varlen"] * (dtype != torch.float32)
    for name in names:
        try:
            seconds[name] = time_attention(name, shape, seq_len, config.micro_rows, device, dtype)
        except (RuntimeError, ImportError, TypeError) as error:
            logger.info("attention %s cannot run here: %s", name, str(error).splitlines()[0])
    fastest = min(seconds, key=lambda name: seconds[name], default="sdpa")
    if fastest == "varlen" and (fault := find_fault()) is not None:
        logger.info("attention varlen does not serve this model: %s", fault)
        del seconds["varlen"]
        fastest = min(seconds, key=lambda name: seconds[name], default="sdpa")
    return fastest


def time_attention(
    name: str,
    shape: ModelShape,
    seq_len: int,
    num_rows: int,
    device: torch.device,
    dtype: torch.dtype,
    num_documents: int = 4,
) -> float:
    """Seconds of one forward and backward pass over rows of documents of one length, the best of five."""
    document_ids = (torch.arange(seq_len, device=device) * num_documents // seq_len).expand(num_rows, seq_len)

    def random(num_heads: int) -> Tensor:
        size = (num_rows, num_heads, seq_len, shape.head_dim)
        return torch.randn(size, device=device, dtype=dtype, requires_grad=True)

    query, key, value = (
        random(count) for count in (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    )
    attend = _make_attend(name, document_ids, dtype)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        attend(query, key, value).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _make_attend(name: str, document_ids_BT: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name in BY_DOCUMENT:
        starts = np.diff(document_ids_BT.cpu().numpy(), prepend=-1) != 0
        offsets = torch.from_numpy(find_offsets(starts)).to(document_ids_BT.device)
        attend = attend_varlen if name == "varlen" else attend_segmented
        return lambda query, key, value: attend(nn.Module(), query, key, value, None, **{OFFSETS: offsets})[0]
    if name == "blocks":
        seen, compiled = _make_mask(document_ids_BT, name), torch.compile(attend_blocks, dynamic=False)
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return lambda query, key, value: compiled(nn.Module(), query, key, value, added)[0]
    if name == "causal":
        return lambda query, key, value: scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
    mask = _make_mask(document_ids_BT, name)
    return lambda query, key, value: _attend(name, query, key, value, mask)


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
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def prefer_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """PyTorch takes cuDNN's attention where that can run: on Hopper it is about twice as fast as the kernel it prefers."""
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    preference: AbstractContextManager[None] = sdpa_kernel(order, set_priority=True)
    return preference


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
