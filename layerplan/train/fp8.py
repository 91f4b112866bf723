"""Opt-in: frozen layers' matrices in FP8 for forward and activation gradients, by torchao; GPUs only.

What trains stays bfloat16 with float32 masters. The relative error of each converted layer against bfloat16 is
measured once at start and reported.
"""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from layerplan.errors import TrainingError
from layerplan.models.causal_lm import DecoderParts
from layerplan.plan.freeze_plan import FreezePlan

logger = logging.getLogger(__name__)


def convert_frozen_layers(parts: DecoderParts, plan: FreezePlan) -> dict[int, float]:
    """Converts the linear layers of frozen decoder layers in place.

    Returns:
        Layer index to the mean relative error of its linear outputs on random input, FP8 against bfloat16.

    Raises:
        TrainingError: When torchao is missing or the device has no FP8 matrix products.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise TrainingError("train.frozen_fp8=true: needs torchao, which is not installed here") from None
    device = next(parts.layers.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise TrainingError(
            f"train.frozen_fp8=true: {device} has no FP8 matrix products (compute capability 8.9 is needed)"
        )
    errors = {}
    for index in plan.frozen_layers:
        layer = parts.layers[index]
        linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        before = {name: copy.deepcopy(layer.get_submodule(name)) for name in linears}
        convert_to_float8_training(layer, config=Float8LinearConfig())
        layer.requires_grad_(False)
        errors[index] = sum(_relative_error(before[name], layer.get_submodule(name)) for name in linears) / len(linears)
    if errors:
        worst = max(errors, key=lambda index: errors[index])
        logger.info("frozen layers in FP8: largest relative error %s, at layer %d", f"{errors[worst]:.2%}", worst)
    return errors


@torch.no_grad()
def _relative_error(exact: nn.Linear, converted: nn.Module) -> float:
    values = torch.randn(256, exact.in_features, device=exact.weight.device, dtype=exact.weight.dtype)
    wanted = exact(values)
    return float((converted(values) - wanted).float().norm() / wanted.float().norm())
