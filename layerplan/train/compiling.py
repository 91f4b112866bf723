"""`train.compile: auto` on a worker: what is decided beforehand, and whether there is a compiler here at all."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec

import torch

from layerplan.config.train import TrainConfig
from layerplan.plan.compiling import choose_compile
from layerplan.plan.cost import predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape
from layerplan.train.agreement import agree_on_fault
from layerplan.train.request import TrainRequest

logger = logging.getLogger(__name__)

OLDEST_CARD = (7, 0)
"""Compute capability that PyTorch's compiler asks for."""


def settle_compile(
    request: TrainRequest, plan: FreezePlan, shape: ModelShape, device: torch.device, *, seq_len: int, world_size: int
) -> Callable[[LossRecipe], TrainConfig]:
    """From the loss recipe to the config with a yes or no in place of `auto`; a collective.

    Under `auto`, what cannot be compiled after all runs as it is; where the config says true, it is an error.
    """
    config = request.config
    torch._dynamo.config.suppress_errors = config.compile == "auto"
    if config.compile != "auto":
        return lambda recipe: config
    fault = agree_on_fault(find_compiler_fault(device), world_size)
    tokens = config.global_batch_size * seq_len / world_size

    def settle(recipe: LossRecipe) -> TrainConfig:
        varies = ""
        if request.labels is not None or recipe.rows == "alone":
            varies = "rows have lengths of their own, each of which would be compiled"
        choice = choose_compile(
            config,
            flops_per_step=tokens * predict_cost(plan, shape, seq_len=seq_len).total_flops,
            num_steps=config.max_steps / max(1, len(request.plan.phases)),
            varies=varies,
            fault=fault,
        )
        logger.info(str(choice))
        return config.model_copy(update={"compile": choice.compiles})

    return settle


def find_compiler_fault(device: torch.device) -> str:
    """Why PyTorch's compiler cannot work for a device; empty when it can."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++", "gcc", "cc")):
        return "there is no C++ compiler here"
    if device.type != "cuda":
        return ""
    if find_spec("triton") is None:
        return "triton is not installed"
    found = torch.cuda.get_device_capability(device)
    return "" if found >= OLDEST_CARD else f"the card's compute capability {found[0]}.{found[1]} is too old"
