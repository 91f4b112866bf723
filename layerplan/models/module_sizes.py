"""Sizes of the modules of a decoder layer that can train by themselves."""

from __future__ import annotations

from torch import nn

from layerplan.models.layer_events import LayerEvents
from layerplan.models.layer_work import is_expert_stack
from layerplan.plan.model_shape import ModuleShape
from layerplan.plan.module_names import name_module


def measure_modules(
    layer: nn.Module, events: LayerEvents | None, *, routed_copies: int, matrix_params: int
) -> tuple[dict[str, ModuleShape], int]:
    """Modules by name, in the model's order, and when positions are mixed.

    Args:
        layer: Any device.
        events: Of its forward pass; without them a gradient is taken to cross everything.
        routed_copies: Experts a token is sent to.
        matrix_params: Weights of the whole layer one token is multiplied with; those of the modules add up to it.
    """
    params: dict[str, int] = {}
    weights: dict[str, float] = {}
    owners: dict[str, str] = {}
    for path, module in layer.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = name_module(f"{path}.{own}" if path else own)
            params[name] = params.get(name, 0) + parameter.numel()
            owners.setdefault(name, path)
            is_matrix = parameter.dim() > 1 and not isinstance(module, nn.Embedding)
            share = _active_share(layer, path, module, routed_copies)
            weights[name] = weights.get(name, 0.0) + (share * parameter.numel() if is_matrix else 0.0)
    matrices = _add_up(weights, matrix_params)
    if events is None:
        shapes = {
            name: ModuleShape(params=params[name], matrix_params=matrices[name], called=0, born=1) for name in params
        }
        return shapes, 1
    stacked = {name: place for place, name in enumerate(params)}
    shapes = {}
    for name, path in owners.items():
        called, born = _find(path, events.called), _find(path, events.born)
        is_stack = is_expert_stack(layer.get_submodule(path))
        late = sum(1 for other in params if is_stack and owners[other] == path and stacked[other] < stacked[name])
        # matrices of one stack are taken to be used in their order
        shapes[name] = ModuleShape(
            params=params[name],
            matrix_params=matrices[name],
            called=_SCALE * called + late,
            born=_SCALE * (called if late else born) + late,
        )
    return _count_from_zero(shapes, _SCALE * (events.mixing or _find_mixing(layer, owners, events)))


_SCALE = 8
"""Events between two of a forward pass, for the matrices of one stack of experts."""


def _count_from_zero(shapes: dict[str, ModuleShape], mixing: int) -> tuple[dict[str, ModuleShape], int]:
    """The same order in numbers without gaps."""
    times = sorted({mixing, *(time for shape in shapes.values() for time in (shape.called, shape.born))})
    place = {time: index for index, time in enumerate(times)}
    counted = {
        name: shape.model_copy(update={"called": place[shape.called], "born": place[shape.born]})
        for name, shape in shapes.items()
    }
    return counted, place[mixing]


def _find(path: str, times: dict[str, int]) -> int:
    """Of a module, or of the nearest around it that was called."""
    names = path.split(".")
    return next(
        (times[found] for end in range(len(names), 0, -1) if (found := ".".join(names[:end])) in times),
        0,
    )


def _find_mixing(layer: nn.Module, owners: dict[str, str], events: LayerEvents) -> int:
    """Without a call of our attention: just before the last matrix of the first part with matrices that runs."""
    called = {
        path: _find(path, events.called)
        for path in owners.values()
        if any(parameter.dim() == 2 for parameter in layer.get_submodule(path).parameters(recurse=False))
    }
    if not called:
        return 0
    mixer = min(called, key=lambda path: called[path]).split(".")[0]
    return max(called[path] for path in called if path.split(".")[0] == mixer)


def _active_share(layer: nn.Module, path: str, module: nn.Module, routed_copies: int) -> float:
    """Of a module's matrices, those one token is multiplied with: of experts as many as it is sent to."""
    if not routed_copies:
        return 1.0
    if is_expert_stack(module):
        return min(1.0, routed_copies / len(next(module.parameters(recurse=False))))
    names = path.split(".")
    lists = (layer.get_submodule(".".join(names[:end])) for end in range(1, len(names)))
    return min((1.0, *(routed_copies / len(item) for item in lists if isinstance(item, nn.ModuleList))))


def _add_up(weights: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the proportion of the weights that add up to the total."""
    found = sum(weights.values())
    factor = total / found if found else 0.0
    rounded = {name: int(factor * weight) for name, weight in weights.items()}
    if rounded:
        largest = max(rounded, key=lambda name: rounded[name])
        rounded[largest] += total - sum(rounded.values())
    return rounded
