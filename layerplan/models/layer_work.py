"""The work of a decoder's layers, counted by PyTorch on tensors without memory.

A model built on the meta device computes shapes and no values, so that PyTorch's FLOP counter tells in a second what a
model of any size does. Every kind of layer runs forward and backward once, with and without gradients for its
parameters and its input; what the counts differ by is what a freeze plan can save:

    forward                          = matrices + mixing
    gradients of the input           = matrices + 2 mixing
    gradients of the parameters only = 2 matrices + 2 mixing - matrices whose input then needs none

A repeated layer hands on what the first of its kind returned: there are no values that could differ.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from layerplan.models import attention_probe, experts_probe
from layerplan.models.attention_probe import AttentionCall
from layerplan.models.causal_lm import DecoderParts
from layerplan.models.layer_events import LayerEvents, watch_events
from layerplan.models.meta import ValuesAreTrue
from layerplan.models.saved_bytes import Sizes, measure_saved_bytes, solve_saved_bytes
from layerplan.plan.model_shape import AttentionKind, SavedBytes

SHORTEST_ROW = 64
"""Tokens of the shorter of two rows, unless a scan works in longer chunks; as long as delta rules chunk by default."""
LONGEST_CHUNK = 512


@dataclass(frozen=True)
class LayerWork:
    """FLOPs per token of one kind of layer, and how it attends."""

    matrix_flops: float
    """Products with weights."""
    first_matrix_flops: float
    """Those of them whose input gradient is not asked for when nothing below the layer trains."""
    attention_flops_per_key: float
    """Products of activations, for every position of the row."""
    scan_flops: float
    """Products of activations that do not grow with the row."""
    attention: tuple[AttentionCall, ...]
    """Calls of attention; empty when there is none, or when the layer attends by code of its own."""
    routed_copies: int
    """Experts a token was sent to."""
    saved_bytes: dict[str, dict[AttentionKind, SavedBytes]] = field(default_factory=dict)
    """What it keeps for the backward pass, by dtype and kind of attention; empty where the layer was not run."""
    events: LayerEvents | None = None
    """When its modules ran; None where the layer was not run."""


@dataclass(frozen=True)
class ModelWork:
    """The layers' work, and what is done beside them."""

    layers: tuple[LayerWork, ...]
    hidden_size: int
    """Width of what the first layer is called with."""
    outside_flops: float
    """Per token, forward: the head and everything else outside the layers."""


def measure_work(model: nn.Module, parts: DecoderParts) -> ModelWork:
    """Counts the work of a model on the meta device.

    Raises:
        Exception: Whatever the model's own code raises when it asks for values that are not there.
    """
    attention_probe.register()
    experts_probe.register()
    _choose_implementations(model)
    tokens = _choose_row(model)
    kinds = [describe_kind(layer) for layer in parts.layers]
    short, long = _Run(parts.layers, kinds, tokens), _Run(parts.layers, kinds, 2 * tokens)
    short.measure(model, with_gradients=True)
    long.measure(model, with_gradients=False)
    works = {kind: _solve(short.counts[kind], long.counts[kind], tokens) for kind in short.counts}
    layers = tuple(works[kind] for kind in kinds)
    return ModelWork(layers, short.hidden_size, short.count_outside(model) / tokens)


def _choose_row(model: nn.Module) -> int:
    """Tokens of the shorter row: whole chunks of every scan, since a scan fills up the last one."""
    sizes = [
        size
        for module in model.modules()
        for name in ("chunk_size", "block_size")
        if isinstance(size := getattr(module, name, None), int) and size <= LONGEST_CHUNK
    ]
    return max([SHORTEST_ROW, *sizes])


@dataclass
class _Counts:
    """FLOPs of one layer over a row."""

    forward: int = 0
    input_gradient: int = 0
    parameter_gradient: int = 0
    attention: tuple[AttentionCall, ...] = ()
    routed_copies: int = 0
    events: LayerEvents | None = None
    saved: dict[tuple[str, bool], Sizes] = field(default_factory=dict)


def _solve(short: _Counts, long: _Counts, tokens: int) -> LayerWork:
    per_key = (long.forward / (2 * tokens) - short.forward / tokens) / tokens
    mixing = short.input_gradient - short.forward
    matrices = short.forward - mixing
    return LayerWork(
        matrix_flops=matrices / tokens,
        first_matrix_flops=(short.input_gradient + matrices - short.parameter_gradient) / tokens,
        attention_flops_per_key=per_key,
        scan_flops=mixing / tokens - per_key * tokens,
        attention=short.attention,
        routed_copies=short.routed_copies,
        events=short.events,
        saved_bytes=solve_saved_bytes(short.saved, long.saved, tokens),
    )


class _Run:
    """Passes of a whole model over a row of zeros, in which each kind of layer runs once."""

    def __init__(self, layers: Sequence[nn.Module], kinds: Sequence[str], num_tokens: int) -> None:
        self.kinds = kinds
        self.counts: dict[str, _Counts] = {}
        self.hidden_size = 0
        self._layers = layers
        self._num_tokens = num_tokens
        self._outputs: dict[str, Any] = {}

    def measure(self, model: nn.Module, *, with_gradients: bool) -> None:
        """Fills `counts`."""
        self._with_gradients = with_gradients
        self._forward(model)
        missing = set(self.kinds) - set(self.counts)
        if missing:
            raise RuntimeError(f"{len(missing)} kinds of layers were not called")

    def count_outside(self, model: nn.Module) -> int:
        """FLOPs outside the layers, which all hand on what they returned before."""
        with counting() as counter:
            self._forward(model)
        return counter.get_total_flops()

    def _forward(self, model: nn.Module) -> None:
        ids = torch.zeros(1, self._num_tokens, dtype=torch.long, device="meta")
        with self._replaced_forwards(), ValuesAreTrue(), torch.enable_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    @contextmanager
    def _replaced_forwards(self) -> Iterator[None]:
        for layer, kind in zip(self._layers, self.kinds, strict=True):
            layer.forward = self._make_forward(layer.forward, layer, kind)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _make_forward(self, original: Callable[..., Any], layer: nn.Module, kind: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kind not in self._outputs:
                with torch.no_grad():  # outside, a gradient tells what depends on parameters
                    self._count(original, layer, kind, args, kwargs)
            return self._outputs[kind]

        return forward

    def _count(
        self, original: Callable[..., Any], layer: nn.Module, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        counts = _Counts()
        trained = (False, True) if self._with_gradients else (False,)
        counts.saved = measure_saved_bytes(original, layer, args, kwargs, trained=trained)
        args, kwargs = tuple(map(_leave_graph, args)), {name: _leave_graph(value) for name, value in kwargs.items()}
        self.hidden_size = self.hidden_size or (args[0] if args else kwargs["hidden_states"]).shape[-1]
        if self._with_gradients:
            counts.input_gradient = _count_gradients(original, layer, args, kwargs, of_input=True)
            counts.parameter_gradient = _count_gradients(original, layer, args, kwargs, of_input=False)
        attention_probe.calls.clear()
        # last, so that what a layer leaves for others, as shared keys, belongs to no graph
        with (
            counting() as counter,
            _watched_experts(layer, counts, self._num_tokens),
            watch_events(layer) as counts.events,
        ):
            self._outputs[kind] = original(*args, **kwargs)
        counts.forward = counter.get_total_flops()
        counts.attention = tuple(attention_probe.calls)
        self.counts[kind] = counts


def _leave_graph(value: Any) -> Any:
    """A tensor, or several, outside any graph; dictionaries that layers share are handed on as they are."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    return tuple(map(_leave_graph, value)) if type(value) is tuple else value


def _count_gradients(
    forward: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, of_input: bool
) -> int:
    """FLOPs of a layer's backward pass, with a gradient for its input or else for its parameters."""

    def as_leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(of_input) if tensor.is_floating_point() else tensor

    # a UserDict, as of keys that layers share, is no tree to PyTorch
    kwargs = {name: dict(value) if isinstance(value, UserDict) else value for name, value in kwargs.items()}
    args, kwargs = tree_map_only(Tensor, as_leaf, (args, kwargs))
    layer.requires_grad_(not of_input)
    with torch.enable_grad():
        output = forward(*args, **kwargs)
    output = output if isinstance(output, Tensor) else next(item for item in output if isinstance(item, Tensor))
    with counting() as counter:
        if output.requires_grad:
            output.backward(torch.zeros_like(output))
    layer.zero_grad()
    return counter.get_total_flops()


@contextmanager
def _watched_experts(layer: nn.Module, counts: _Counts, num_tokens: int) -> Iterator[None]:
    """Notes how many experts a token is sent to: the width of the indices that a stack of experts is called with."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for item in (*args, *kwargs.values()):
            if isinstance(item, Tensor) and item.dtype == torch.int64 and item.dim() == 2 and len(item) == num_tokens:
                counts.routed_copies = item.shape[-1]

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in layer.modules()
        if is_expert_stack(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_expert_stack(module: nn.Module) -> bool:
    """Whether a module's own parameters are matrices of several experts, (experts, in, out)."""
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return bool(own) and not isinstance(module, nn.Conv1d) and len({len(parameter) for parameter in own}) == 1


def describe_kind(layer: nn.Module) -> str:
    """Text that two layers share when they are built alike: classes, sizes and settings, not the position."""
    lines = []
    for path, module in layer.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, str | bool | int | None) and not name.startswith("_") and not _is_place(name)
        }
        shapes = [(name, tuple(value.shape)) for name, value in module.named_parameters(recurse=False)]
        lines.append(f"{path} {type(module).__name__} {settings} {shapes}")
    return "\n".join(lines)


def _is_place(name: str) -> bool:
    return name.endswith(("idx", "index", "layer_id", "layer_number", "layer_num"))


def _choose_implementations(model: nn.Module) -> None:
    """Our attention where the model lets it be chosen, and experts without loops over values."""
    attentions = (attention_probe.NAME, "eager") if getattr(model, "_can_set_attn_implementation", bool)() else ()
    experts = (experts_probe.NAME,)
    for setter, names in (("set_attn_implementation", attentions), ("set_experts_implementation", experts)):
        for name in names:
            try:
                getattr(model, setter)(name)
                break
            except (AttributeError, ValueError, KeyError, ImportError):
                continue


def counting() -> FlopCounterMode:
    """PyTorch's FLOP counter, right about grouped convolutions."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _grouped_backward})


def _grouped_backward(
    gradient: Sequence[int], _x: object, weight: Sequence[int], *args: Any, out_shape: object = None, **_: Any
) -> int:
    wanted = args[-1]
    products = 1
    for size in (*gradient, *weight[1:]):
        products *= size
    return 2 * products * (int(wanted[0]) + int(wanted[1]))
