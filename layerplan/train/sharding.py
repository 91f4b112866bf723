"""FSDP2 units aligned with the plan: one per decoder layer, so no unit mixes trained and frozen layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from layerplan.config.train import TrainConfig
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.train.step import LossModel


def cast_for_training(causal_lm: nn.Module, config: TrainConfig) -> None:
    """Puts frozen parameters into the compute dtype; what trains keeps float32 masters."""
    dtype = getattr(torch, config.compute_dtype)
    for parameter in causal_lm.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shard_model(causal_lm: nn.Module, plan: FreezePlan, config: TrainConfig, mesh: DeviceMesh | None) -> nn.Module:
    """Wraps the model for its loss and shards it over the mesh; without a mesh it stays whole.

    The plan must be applied before: FSDP decides per unit by `requires_grad`, and the optimizer must be built after,
    over the sharded parameters.
    """
    if mesh is None:
        return LossModel(causal_lm)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = getattr(torch, config.compute_dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    parts = find_decoder_parts(causal_lm)
    ignored: set[nn.Parameter] = set()
    for index, layer in enumerate(parts.layers):
        if index not in plan.trainable_layers and config.frozen_sharding != "shard":
            ignored |= set(layer.parameters())
        else:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=index in plan.trainable_layers)
    model = LossModel(causal_lm)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored or None)
    return model
