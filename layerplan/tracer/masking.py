"""All perturbations of a probe at once: JS(l) needs the output of every "context masked after block l" (Eq. 2).

Done naively that is one full forward pass per layer. Here the intact pass is made once, and the perturbed copies start
where they first differ from it: a copy masked after block l joins the batch before block l + 1. Three ways to carry
the copies on, all exact, the cheapest first:

`query_rows`   Zero mask, every position before the query masked, attention layers without biases: masked rows stay
               exactly zero through every block (a zero row has zero queries, keys and values, and a norm keeps it
               zero). So only the query's rows are computed, against keys and values of zeros.
`equal_rows`   Every position before the query masked, attention layers of any kind: masked rows are equal to each other
               after the mask, and stay equal, since attention over equal values returns that value whatever its
               weights. So whatever acts on positions alone is computed for one of them and copied to the others.
`sweep`        Any decoder whose blocks treat rows of a batch independently: all positions are computed.
`layerwise`    One forward pass per layer; for decoders whose blocks do not accept more rows than the trunk made.

A way is used only after it has reproduced `layerwise` on a probe of the model at hand (`choose_way`).

Shapes: B probes, T tokens, Q positions from the first query position on, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerplan.errors import ModelError
from layerplan.tracer.model_runner import LayerRunner
from layerplan.tracer.zero_context import attending_to_zeros

Mask = Literal["zero", "mean"]
Way = Literal["query_rows", "equal_rows", "sweep", "layerwise"]
WAYS: dict[Mask, tuple[Way, ...]] = {
    "zero": ("query_rows", "equal_rows", "sweep", "layerwise"),
    "mean": ("equal_rows", "sweep", "layerwise"),
}
WAY_TOLERANCE = 2e-5
"""Largest error of a way's logits, relative to the largest logit, that its self-test accepts."""


def mask_context(hidden: Tensor, context_BT: Tensor, mask: Mask) -> Tensor:
    """Replaces the context's rows by zeros or by their mean per channel; (..., B, T, D) to the same."""
    inside = context_BT[..., None]
    if mask == "zero":
        return hidden.masked_fill(inside, 0.0)
    weights = inside.to(hidden.dtype)
    mean = (hidden * weights).sum(-2, keepdim=True) / weights.sum(-2, keepdim=True).clamp_min(1)
    return torch.where(inside, mean, hidden)


def is_masked_up_to_query(context_BT: Tensor) -> bool:
    """Whether in every probe the context is a run of positions from 0 on, with no unmasked token before its end."""
    lengths_B = context_BT.sum(-1, keepdim=True)
    positions_T = torch.arange(context_BT.shape[1], device=context_BT.device)
    return bool((context_BT == (positions_T < lengths_B)).all())


def has_time_convolution(module: nn.Module) -> bool:
    """Whether a convolution over positions is inside, as in every recurrent layer of transformers' hybrid families."""
    return any(isinstance(part, nn.Conv1d) for part in module.modules())


def trace_masked(
    runner: LayerRunner, input_ids_BT: Tensor, states_LBTD: Tensor, context_BT: Tensor, mask: Mask, way: Way
) -> Tensor:
    """Residual stream at `last` after the last block, when the context is masked after block l = 0..L-1: (L, B, D).

    Args:
        runner: The model.
        input_ids_BT: Probes of one length.
        states_LBTD: Their intact residual streams around every block, (L + 1, B, T, D).
        context_BT: True for context positions.
        mask: What replaces the context.
        way: How the copies are carried on; `query_rows` and `equal_rows` need `is_masked_up_to_query`.

    Masking after block L changes nothing at `last`, which belongs to the query, and is left out.
    """
    if way == "layerwise":
        layers = range(runner.num_layers)
        return torch.stack([_mask_one(runner, input_ids_BT, states_LBTD, context_BT, mask, layer) for layer in layers])
    masked = mask_context(states_LBTD[:-1], context_BT, mask)
    if way == "sweep":
        return _carry_on(runner, input_ids_BT, masked)
    num_before = int(context_BT.sum(-1).min())
    if way == "equal_rows":
        with sharing_equal_rows(runner, num_before, input_ids_BT.shape[1]):
            return _carry_on(runner, input_ids_BT, masked)
    positions_BQ = torch.arange(num_before, input_ids_BT.shape[1], device=runner.device).expand(len(input_ids_BT), -1)
    with attending_to_zeros(runner.model, num_before):
        return _carry_on(runner, input_ids_BT[:, num_before:], masked[:, :, num_before:], positions_BQ)


def choose_way(runner: LayerRunner, input_ids_BT: Tensor, states_LBTD: Tensor, context_BT: Tensor, mask: Mask) -> Way:
    """The cheapest way that reproduces `layerwise` on the first of these probes, tested at four layers.

    Raises:
        ModelError: Naming the class when masking by hooks does not reach its residual stream.
    """
    ids, states, context = input_ids_BT[:1], states_LBTD[:, :1], context_BT[:1]
    last = runner.num_layers - 1
    layers = sorted({0, 1, (last + 1) // 2, last})
    expected = torch.stack([_mask_one(runner, ids, states, context, mask, layer) for layer in layers])
    expected = runner.lens(expected)
    if not bool(torch.isfinite(expected).all()):
        raise ModelError(f"{runner.name}: its logits are not finite when the context is masked ({mask})")
    for way in WAYS[mask]:
        if way in ("query_rows", "equal_rows") and not is_masked_up_to_query(context_BT):
            continue
        if way == "query_rows" and has_time_convolution(runner.parts.layers):
            continue
        if way == "layerwise" or _reproduces(runner, ids, states, context, mask, way, layers, expected):
            return way
    raise AssertionError("layerwise is always possible")


@contextmanager
def sharing_equal_rows(runner: LayerRunner, num_before: int, num_tokens: int) -> Iterator[None]:
    """Computes what acts on each position alone for one of the first `num_before` positions, which must be equal.

    Taken for such are all modules inside a layer that are called with one (rows, T, width) tensor and no other, and
    hold no convolution over time: norms, feed-forward layers, the linear maps of an attention. What that misjudges,
    the self-test of `choose_way` refuses.
    """
    one_and_query = torch.arange(num_before - 1, num_tokens, device=runner.device)
    back = (torch.arange(num_tokens, device=runner.device) - (num_before - 1)).clamp_min(0)
    running: set[nn.Module] = set()

    def shrink(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if value is not None]
        if len(args) != 1 or len(tensors) != 1 or not isinstance(args[0], Tensor):
            return args, kwargs
        if args[0].ndim != 3 or args[0].shape[1] != num_tokens:
            return args, kwargs
        running.add(module)
        return (args[0].index_select(1, one_and_query),), kwargs

    def grow(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if module not in running:
            return output
        running.remove(module)
        if isinstance(output, tuple):
            return (output[0].index_select(1, back), *output[1:])
        return output.index_select(1, back)

    with ExitStack() as stack:
        for layer in runner.parts.layers if num_before > 1 else ():
            for module in layer.modules():
                if module is not layer and not has_time_convolution(module):
                    stack.callback(module.register_forward_pre_hook(shrink, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(grow).remove)
        yield


def _carry_on(
    runner: LayerRunner, input_ids_BT: Tensor, joining_LBTD: Tensor, positions_BT: Tensor | None = None
) -> Tensor:
    """Runs all copies, each from the block before which it joins; the last position at the end: (L, B, D)."""
    num_rows = len(input_ids_BT)
    final: list[Tensor] = []

    def enter(layer_idx: int, hidden: Tensor) -> Tensor:
        return joining_LBTD[0] if layer_idx == 0 else torch.cat([hidden, joining_LBTD[layer_idx]])

    def leave(hidden: Tensor) -> Tensor:
        final.append(hidden[:, -1])
        return hidden[:num_rows]

    with runner.intercepting(num_rows, enter, leave):
        runner.forward(input_ids_BT, positions_BT)
    return final[0].reshape(runner.num_layers, num_rows, -1)


def _mask_one(
    runner: LayerRunner, input_ids_BT: Tensor, states_LBTD: Tensor, context_BT: Tensor, mask: Mask, after_block: int
) -> Tensor:
    final: list[Tensor] = []

    def enter(layer_idx: int, hidden: Tensor) -> Tensor:
        return mask_context(hidden, context_BT, mask) if layer_idx == after_block else hidden

    def leave(hidden: Tensor) -> Tensor:
        final.append(hidden[:, -1])
        return hidden

    with runner.intercepting(len(input_ids_BT), enter, leave):
        runner.forward(input_ids_BT)
    return final[0]


def _reproduces(
    runner: LayerRunner,
    ids: Tensor,
    states: Tensor,
    context: Tensor,
    mask: Mask,
    way: Way,
    layers: list[int],
    expected: Tensor,
) -> bool:
    try:
        found = runner.lens(trace_masked(runner, ids, states, context, mask, way)[layers])
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        # a block that refuses these shapes; what it says is of no use to anyone, the next way is tried
        return False
    return bool((found - expected).abs().max() <= WAY_TOLERANCE * expected.abs().max().clamp_min(1))
