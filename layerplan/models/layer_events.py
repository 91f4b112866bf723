"""When the modules of a layer run, and when what they are given came into being: which of them a gradient crosses.

Of a module that trains as the lowest, the gradient passes through every module whose input came after it. Inputs are told
apart as objects, a view of the same width as what it is a view of: three projections of one state were given the same
tensor, which was there before any of them ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from layerplan.models import attention_probe


@dataclass
class LayerEvents:
    """Counts of events of one forward pass, from 1."""

    called: dict[str, int] = field(default_factory=dict)
    """When a module ran, by its path inside the layer."""
    born: dict[str, int] = field(default_factory=dict)
    """When its input came into being."""
    mixing: int = 0
    """When attention ran; 0 when ours was not called."""


@contextmanager
def watch_events(layer: nn.Module) -> Iterator[LayerEvents]:
    """Notes the events of the layer's next forward pass."""
    events = LayerEvents()
    births: dict[int, tuple[int, Tensor]] = {}  # tensors are held, so that no other gets their place
    clock = iter(range(1, 1_000_000))

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = next(clock)
        given = next((item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)), None)
        if given is None or path in events.called:
            return
        events.called[path] = now
        given = _root(given)
        events.born[path] = births.setdefault(id(given), (now, given))[0]

    def after(output: Any) -> None:
        now = next(clock)
        for item in output if isinstance(output, tuple) else (output,):
            if isinstance(item, Tensor):
                births[id(_root(item))] = now, _root(item)

    def attended() -> None:
        events.mixing = events.mixing or next(clock)

    handles = []
    for path, module in layer.named_modules():
        if path:
            handles += [
                module.register_forward_pre_hook(lambda _, a, k, path=path: before(path, a, k), with_kwargs=True),
                module.register_forward_hook(lambda _, a, output: after(output)),
            ]
    attention_probe.on_call = attended
    try:
        yield events
    finally:
        attention_probe.on_call = None
        for handle in handles:
            handle.remove()


def _root(tensor: Tensor) -> Tensor:
    """The tensor of the same width that this one is a view of, as of a state whose rows and tokens became one dimension."""
    base = tensor._base
    return tensor if base is None or base.shape[-1:] != tensor.shape[-1:] else base
