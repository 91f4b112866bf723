"""Which modules of a layer that trains in part become FSDP units of their own, so that no unit mixes both sides of the plan.

The layer's unit takes what its modules leave. A module whose own parameters are of the other side than the unit around it
becomes a unit; within it the same holds again. Modules without parameters of their own, as a feed-forward part, become none:
they may return views, on which a later operation in place would drop FSDP's hook.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def list_mixed(layer: nn.Module) -> set[nn.Parameter]:
    """Frozen parameters that lie beside trained ones in one module, which no unit can tell apart; they stay whole."""
    found: set[nn.Parameter] = set()
    for module in layer.modules():
        own = list(module.parameters(recurse=False))
        if len({parameter.requires_grad for parameter in own}) > 1:
            found |= {parameter for parameter in own if not parameter.requires_grad}
    return found


def list_units(layer: nn.Module, ignored: Collection[nn.Parameter]) -> list[nn.Module]:
    """Modules below the layer that need a unit of their own, innermost first, as FSDP wants them.

    Args:
        layer: The plan was applied to it.
        ignored: Parameters that are not sharded.
    """
    units: list[nn.Module] = []
    sides = _sides(layer, ignored)
    if len(sides) > 1:
        own = _own_sides(layer, ignored)
        _collect(layer, next(iter(own), False), ignored, units)
    return units


def _collect(module: nn.Module, side: bool, ignored: Collection[nn.Parameter], units: list[nn.Module]) -> None:
    for child in module.children():
        below, own = _sides(child, ignored), _own_sides(child, ignored)
        if own and own != {side}:
            _collect(child, not side, ignored, units)
            units.append(child)
        elif below:
            _collect(child, side, ignored, units)


def _sides(module: nn.Module, ignored: Collection[nn.Parameter]) -> set[bool]:
    return {parameter.requires_grad for parameter in module.parameters() if parameter not in ignored}


def _own_sides(module: nn.Module, ignored: Collection[nn.Parameter]) -> set[bool]:
    return {parameter.requires_grad for parameter in module.parameters(recurse=False) if parameter not in ignored}
