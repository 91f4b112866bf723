"""Which matrices of a layer must be zero for it to hand on what it is given: asked of the layer itself.

A decoder layer adds what its branches give to the residual stream, so that a copy whose branches end in zeros changes
nothing. Where they end, the layer tells: all its matrices that lead to the residual width are set to zero, and those that
make no difference get their values back, one after the other. A layer that moves the stream all the same has a bias
behind them, or a norm behind the sum, and its family cannot be expanded this way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerplan.errors import ModelError
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.head import make_inputs

NUM_TOKENS = 8


@torch.no_grad()
def find_output_projections(model: nn.Module, index: int) -> tuple[str, ...]:
    """Names, inside the layer, of the parameters without which it is the identity; the layer keeps its values.

    Raises:
        ModelError: Naming the class, when no choice of matrices makes it the identity.
    """
    layer = find_decoder_parts(model).layers[index]
    width = find_decoder_parts(model).lm_head.weight.shape[-1]
    candidates = {
        name: parameter
        for name, parameter in layer.named_parameters()
        if parameter.dim() > 1 and width in parameter.shape
    }
    kept = {name: parameter.detach().clone() for name, parameter in candidates.items()}
    call = _record_call(model, layer)
    try:
        for parameter in candidates.values():
            parameter.zero_()
        if not _is_identity(layer, call):
            raise ModelError(
                f"{type(model).__name__}: with its output projections at zero a layer still changes the residual stream, by a"
                " bias or by a norm after the sum, so that a copy of it is not without effect; model.expand cannot be used"
            )
        needed = []
        for name, parameter in candidates.items():
            parameter.copy_(kept[name])
            if not _is_identity(layer, call):
                parameter.zero_()
                needed.append(name)
        return tuple(needed)
    finally:
        for name, parameter in candidates.items():
            parameter.copy_(kept[name])


def _record_call(model: nn.Module, layer: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model calls the layer with, for a few tokens."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        model(**make_inputs(model, torch.arange(NUM_TOKENS)[None]))
    finally:
        handle.remove()
    return calls[0]


def _is_identity(layer: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    args, kwargs = call
    given: Tensor = args[0] if args else kwargs["hidden_states"]
    answer = layer(*args, **kwargs)
    return torch.equal(answer if isinstance(answer, Tensor) else answer[0], given)
