"""Which parts of decoder layers train by themselves: patterns over their names, and the top share of each kind.

`layerplan/plan/module_names.py` says what a part is called.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from layerplan.errors import PlanError
from layerplan.plan.freeze_plan import Modules
from layerplan.plan.model_shape import ModelShape

ROUNDING = 1e-9
"""What a share times a count may miss a whole number by."""


def choose_modules(
    patterns: Sequence[str], layers: Sequence[int], shape: ModelShape
) -> tuple[tuple[int, ...], Modules]:
    """What trains of some layers when only modules that a pattern names do.

    A pattern names a module, everything below a part of the layer (`mlp`), or what its `*` and `?` fit (`*_proj`).

    Returns:
        The layers that have such a module, and their modules; a layer all of whose modules train is not among the latter.

    Raises:
        PlanError: When a pattern matches no module of any layer, or their modules are not known.
    """
    known = {name: None for layer in range(shape.num_layers) for name in list_modules(shape, layer)}
    for pattern in patterns:
        if not any(_fits(pattern, name) for name in known):
            nearest = max(known, key=lambda name: difflib.SequenceMatcher(None, pattern, name).ratio())
            raise PlanError(
                f"plan.modules: {pattern!r} matches no module of a layer; the nearest is {nearest} (of {', '.join(known)})"
            )
    names = {layer: list_modules(shape, layer) for layer in layers}
    found = {
        layer: tuple(name for name in each if any(_fits(pattern, name) for pattern in patterns))
        for layer, each in names.items()
    }
    return settle(found, shape)


def settle(found: Mapping[int, Sequence[str]], shape: ModelShape) -> tuple[tuple[int, ...], Modules]:
    """Layers that train, and the modules of those that train in part; names are sorted.

    Raises:
        PlanError: When a layer that shares parameters with others would train in part.
    """
    layers = tuple(sorted(layer for layer, names in found.items() if names))
    modules = {layer: tuple(sorted(found[layer])) for layer in layers}
    partial = {layer: names for layer, names in modules.items() if set(names) != set(list_modules(shape, layer))}
    for block in shape.shared:
        if cut := sorted(partial.keys() & set(block.layers)):
            raise PlanError(
                f"plan.modules: layer {cut[0]} shares parameters with layers {', '.join(map(str, block.layers))}; such"
                " layers train whole or not at all"
            )
    return layers, partial


def list_modules(shape: ModelShape, layer: int) -> list[str]:
    """Names of a layer's modules, in the model's order; raises `PlanError` where they are not known."""
    if not shape.layers[layer].modules:
        raise PlanError(f"layer {layer}: its modules are not known, so that none of them can train by itself")
    return list(shape.layers[layer].modules)


def choose_top_share(
    kinds: Mapping[str, Sequence[float | None]], share: float, *, from_worst: bool = False
) -> dict[str, list[int]]:
    """Spectrum's choice: of each kind of module the layers with the largest values, a share of them rounded down.

    Args:
        kinds: Values by layer; None where a layer has no such module.
        share: In (0, 1].
        from_worst: Take the smallest values: a control.
    """
    chosen = {}
    for kind, values in kinds.items():
        sign = 1.0 if from_worst else -1.0
        there = [(sign * value, layer) for layer, value in enumerate(values) if value is not None]
        chosen[kind] = sorted(layer for _, layer in sorted(there)[: int(len(there) * share + ROUNDING)])
    return chosen


def by_layer(chosen: Mapping[str, Sequence[int]]) -> dict[int, list[str]]:
    """Layers by kind turned into kinds by layer."""
    layers = sorted({layer for each in chosen.values() for layer in each})
    return {layer: sorted(kind for kind, each in chosen.items() if layer in each) for layer in layers}


def _fits(pattern: str, name: str) -> bool:
    return name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
