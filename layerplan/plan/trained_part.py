"""What of a decoder layer trains under a plan, and what its backward pass crosses: pure functions over plan and sizes."""

from __future__ import annotations

from layerplan.errors import PlanError
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape, ModuleShape


def count_trained_layer_params(plan: FreezePlan, shape: ModelShape) -> int:
    """Parameters of all decoder layers that train."""
    whole = [layer for layer in plan.trainable_layers if layer not in plan.trainable_modules]
    parts = [module.params for layer in plan.trainable_modules for module in _trained(plan, shape, layer)]
    return shape.count_layer_params(whole) + sum(parts)


def count_trained_params(plan: FreezePlan, shape: ModelShape, layer: int) -> int:
    """Parameters of one layer that train."""
    if layer in plan.trainable_modules:
        return sum(module.params for module in _trained(plan, shape, layer))
    return shape.layer_params(layer) if layer in plan.trainable_layers else 0


def trained_matrix_params(plan: FreezePlan, shape: ModelShape, layer: int) -> int:
    """Weights of a layer that train and that one token is multiplied with."""
    if layer in plan.trainable_modules:
        return sum(module.matrix_params for module in _trained(plan, shape, layer))
    return shape.layers[layer].matrix_params if layer in plan.trainable_layers else 0


def path_matrix_params(plan: FreezePlan, shape: ModelShape, layer: int) -> int:
    """Weights whose input needs a gradient when a part of the layer trains and nothing below it does."""
    lowest = min(module.called for module in _trained(plan, shape, layer))
    return sum(module.matrix_params for module in shape.layers[layer].modules.values() if module.born > lowest)


def is_mixing_on_path(plan: FreezePlan, shape: ModelShape, layer: int) -> bool:
    """Whether the gradient for the trained part of a layer passes through what mixes positions."""
    return min(module.called for module in _trained(plan, shape, layer)) < shape.layers[layer].mixing_called


def _trained(plan: FreezePlan, shape: ModelShape, layer: int) -> list[ModuleShape]:
    modules = shape.layers[layer].modules
    for name in plan.trainable_modules[layer]:
        if name not in modules:
            known = ", ".join(modules) or "not known"
            raise PlanError(f"freeze plan {plan.sha256[:12]}: layer {layer} has no module {name!r}; they are {known}")
    return [modules[name] for name in plan.trainable_modules[layer]]
