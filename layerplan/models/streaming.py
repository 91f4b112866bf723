"""A model that runs although memory holds one decoder layer of it at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from layerplan.models.causal_lm import FOREIGN_ERRORS, find_decoder_parts

Read = Callable[[str], Tensor]
"""From a parameter's Hugging Face name to its values."""


@dataclass(frozen=True)
class _Place:
    """Where a module holds a parameter."""

    module: nn.Module
    key: str
    parameter: nn.Parameter
    name: str
    """The parameter's first name."""


def run_streamed(model: nn.Module, read: Read, run: Callable[[], Tensor]) -> Tensor:
    """What a model on the meta device computes of some values, read while it runs; afterwards it is as before.

    A model whose code reaches into its layers from outside is given all values at once.

    Args:
        model: With its buffers in memory.
        read: Gives the values. It is called while the model runs, and finds no parameter in it then.
        run: Calls the model.

    Raises:
        Exception: What reading a value or calling the model raised.
    """
    outside, layers = _sort_places(model)
    failed: list[Exception] = []

    def read_here(name: str) -> Tensor:
        try:
            return read(name)
        except Exception as error:
            failed.append(error)
            raise

    try:
        with ExitStack() as running:
            for layer, places in layers:
                running.enter_context(_lent_while_running(layer, places, read_here))
            running.enter_context(_lent(outside, read_here))
            return run()
    except FOREIGN_ERRORS:
        if failed:  # not the model's doing
            raise
        with _lent([*outside, *(place for _, places in layers for place in places)], read):
            return run()


def _sort_places(model: nn.Module) -> tuple[list[_Place], list[tuple[nn.Module, list[_Place]]]]:
    """What stays in memory, and by decoder layer what no other part of the model holds."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers = find_decoder_parts(model).layers
    owner = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    places = [
        _Place(module, key, parameter, names[parameter])
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    holders: dict[nn.Parameter, set[int | None]] = {}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            holders.setdefault(parameter, set()).add(index)
    for place in places:
        holders.setdefault(place.parameter, set()).add(owner.get(place.module))
    inside = {parameter: next(iter(found)) for parameter, found in holders.items() if len(found) == 1}
    outside = [place for place in places if inside.get(place.parameter) is None]
    return outside, [
        (layer, [place for place in places if inside.get(place.parameter) == index])
        for index, layer in enumerate(layers)
    ]


@contextmanager
def _lent(places: Sequence[_Place], read: Read) -> Iterator[None]:
    with _kept_in_order(places):
        _lend(places, read)
        yield


@contextmanager
def _lent_while_running(layer: nn.Module, places: Sequence[_Place], read: Read) -> Iterator[None]:
    """Whoever asks for a parameter of the layer while it does not run is told that there is none.

    Left on the meta device it would do worse: PyTorch multiplies by it, and gives out whatever lies in memory.
    """

    def before(*_: Any) -> None:
        _lend(places, read)

    def after(*_: Any) -> None:
        for place in places:
            place.module._parameters.pop(place.key, None)

    handles = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)]
    with _kept_in_order(places):
        after()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _kept_in_order(places: Sequence[_Place]) -> Iterator[None]:
    """Puts the modules' parameters back as they were."""
    before = {place.module: dict(place.module._parameters) for place in places}
    try:
        yield
    finally:
        for module, parameters in before.items():
            module._parameters.clear()
            module._parameters.update(parameters)


def _lend(places: Sequence[_Place], read: Read) -> None:
    lent: dict[nn.Parameter, nn.Parameter] = {}
    for place in places:
        if place.parameter not in lent:
            lent[place.parameter] = nn.Parameter(read(place.name), requires_grad=False)
        place.module._parameters[place.key] = lent[place.parameter]
