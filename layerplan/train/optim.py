"""AdamW over what the plan trains, in two groups: matrices decay, vectors do not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layerplan.config.train import OptimizerConfig
from layerplan.errors import TrainingError


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Builds AdamW over the parameters that require gradients; build it after sharding.

    Raises:
        TrainingError: When nothing trains.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError("the plan trains no parameter of this model")
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clips to the global L2 norm and returns the norm before clipping, the same on every rank."""
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
