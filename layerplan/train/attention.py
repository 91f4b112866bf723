"""Which attention runs on packed rows.

`varlen` (GPU) and `segmented` (CPU) read each document alone, at a cost of the sum of their squared lengths, and take no
mask (`layerplan/train/document_attention.py`); `flex` (FlexAttention, GPU) leaves out blocks in which nothing is seen
(`layerplan/train/flex_documents.py`). For the others masks are made by `transformers`, as each layer means them, from
positions that restart. A row made of one document needs none: the plain causal kernel runs. `eager` and `blocks`
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

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerplan.config.train import TrainConfig
from layerplan.errors import TrainingError, first_line
from layerplan.plan.attention import CAUSAL, expect_attention
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape
from layerplan.train.block_attention import BLOCKS
from layerplan.train.document_attention import OFFSETS, SEGMENTED, VARLEN, find_offsets
from layerplan.train.flex_documents import FLEX, make_masks

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "sdpa": "sdpa",
    "flex": FLEX,
    "eager": "eager",
    "varlen": VARLEN,
    "segmented": SEGMENTED,
    "blocks": BLOCKS,
}
"""Our name to transformers' name."""
BY_DOCUMENT = {"varlen": "cuda", "flex": "cuda", "segmented": "cpu"}
"""Those that read each document alone, and the device they are for."""
_TIMED_CALLS = 5
"""Calls that an attention is timed by, after those that warm it up."""
_HEAD_START = 200_000_000
"""Cycles that a GPU is kept busy while the host launches what is timed: about a tenth of a second."""


def choose_attention(
    config: TrainConfig,
    shape: ModelShape,
    seq_len: int,
    device: torch.device,
    recipe: LossRecipe,
    find_fault: Callable[[str], str | None] = lambda name: None,
    find_blocks_fault: Callable[[], str | None] = lambda: None,
    agree: Callable[[list[str]], list[str]] = lambda names: names,
) -> str:
    """Returns a name of `IMPLEMENTATIONS`: what the model needs, what the config says, or the fastest one on a GPU.

    Every worker asks the same in the same order, so that what it is given may be collectives.

    Args:
        config: Training section.
        shape: Sizes of the model.
        seq_len: Tokens per row.
        device: Where training runs.
        recipe: How the model's loss is computed.
        find_fault: Asks the model why one of `BY_DOCUMENT` cannot read its documents one by one; None when it can.
        find_blocks_fault: Asks the model why its attention cannot be computed in blocks; None when it can.
        agree: From the names in the order in which they were fast here to those that all workers go by.

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
    for name in agree(order_by_time(config, shape, seq_len, device)):
        fault = find_fault(name) if name in BY_DOCUMENT else None
        if fault is None:
            return name
        logger.info("attention %s does not serve this model: %s", name, fault)
    return "sdpa"


def _check_by_document(
    config: TrainConfig, device: torch.device, recipe: LossRecipe, find_fault: Callable[[str], str | None]
) -> None:
    where = BY_DOCUMENT[config.attention]
    fault = None
    if device.type != where:
        fault = f"it is for {where.upper().replace('CUDA', 'GPU')}s, this worker computes on a {device.type}"
    elif config.attention == "varlen" and config.compute_dtype == "float32":
        fault = "its kernel has no float32; use train.compute_dtype=bfloat16"
    elif recipe.attention == "eager":
        fault = "the model needs its own attention"
    _refuse(config, fault or find_fault(config.attention))


def _refuse(config: TrainConfig, fault: str | None) -> None:
    if fault is not None:
        raise TrainingError(f"train.attention={config.attention}: {fault}; train.attention=auto takes another")


def order_by_time(config: TrainConfig, shape: ModelShape, seq_len: int, device: torch.device) -> list[str]:
    """Names of `IMPLEMENTATIONS` that run on a GPU, the fastest first."""
    seconds = {}
    dtype = getattr(torch, config.compute_dtype)
    for name in ["sdpa", "flex"] + ["varlen"] * (dtype != torch.float32):
        try:
            seconds[name] = time_attention(
                name, shape, seq_len, config.micro_rows, device, dtype, compiled=config.compiles
            )
        except (RuntimeError, ImportError, TypeError) as error:
            logger.info("attention %s cannot run here: %s", name, first_line(error))
    return sorted(seconds, key=lambda name: seconds[name])


def time_attention(
    name: str,
    shape: ModelShape,
    seq_len: int,
    num_rows: int,
    device: torch.device,
    dtype: torch.dtype,
    num_documents: int = 4,
    *,
    compiled: bool = False,
) -> float:
    """Seconds of one forward and backward pass over rows of documents of one length, as a layer calls it.

    Args:
        name: Of `IMPLEMENTATIONS`, or `causal`: rows of one document, without a mask.
        shape: Sizes of the model.
        seq_len: Tokens per row.
        num_rows: Rows.
        device: Where it runs.
        dtype: Of queries, keys and values.
        num_documents: A row.
        compiled: Whether layers are compiled. On a GPU it is then the time of the kernels alone that counts, a mean of
            five calls; otherwise what the host takes to call them counts too, the best of five.
    """
    documents_BT = (torch.arange(seq_len, device=device) * num_documents // seq_len).expand(num_rows, seq_len)

    def random(num_heads: int) -> Tensor:
        size = (num_rows, num_heads, seq_len, shape.head_dim)
        return torch.randn(size, device=device, dtype=dtype, requires_grad=True)

    query, key, value = (
        random(count) for count in (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    )
    attend = _make_attend(name, shape, documents_BT, dtype)
    if compiled or name == "blocks":  # which is for compiled layers alone
        attend = torch.compile(attend, dynamic=False)

    def work() -> None:
        attend(query, key, value).sum().backward()

    if compiled and device.type == "cuda":
        return _time_kernels(work, device)
    best = float("inf")
    for _ in range(1 + _TIMED_CALLS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _time_kernels(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the device, which is kept busy until all is launched, so that it never waits for the host."""
    for _ in range(2):
        work()
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)
    start.record()
    for _ in range(_TIMED_CALLS):
        work()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3 / _TIMED_CALLS


def _make_attend(
    name: str, shape: ModelShape, documents_BT: Tensor, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A layer's attention over rows of such documents, under the mask that it is given in training."""
    from transformers import AttentionInterface

    module = nn.Module()
    module.num_key_value_groups = shape.num_attention_heads // shape.num_key_value_heads
    run = AttentionInterface()[IMPLEMENTATIONS["sdpa" if name == "causal" else name]]
    mask: Tensor | None = None
    asked: dict[str, Any] = {}
    starts_BT = torch.diff(documents_BT, prepend=documents_BT[:, :1] - 1) != 0
    if name == "flex":
        places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
        positions_BT = places_T - torch.where(starts_BT, places_T, 0).cummax(1).values
        asked[OFFSETS] = make_masks(positions_BT, tuple(positions_BT.shape), (), positions_BT.device)
    elif name in BY_DOCUMENT:
        asked[OFFSETS] = torch.from_numpy(find_offsets(starts_BT.cpu().numpy())).to(documents_BT.device)
    elif name != "causal":
        mask = torch.tril(documents_BT[:, :, None] == documents_BT[:, None, :])[:, None]
    if name == "blocks":
        assert mask is not None
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return lambda query, key, value: run(module, query, key, value, mask, **asked)[0]


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
