"""Predicted memory of the hosts, beside that of the devices: while workers read the base, and while the driver exports.

A worker reads what it keeps of the base and nothing else, through a buffer; on a CPU what it keeps lies in the same
memory. The driver writes an export a tensor at a time and computes logits a decoder layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerplan.config.train import TrainConfig
from layerplan.plan.cost import count_trainable_params, trains_head
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement

PROCESS_BYTES = 0.6 * 2**30
"""A process that has imported torch and transformers."""
READING_BYTES = 96 * 2**20
"""A buffer of 32 MiB as it is read, in float32, and as it is kept."""
_FLOAT32 = 4


@dataclass(frozen=True)
class HostEstimate:
    """Predicted bytes."""

    shard: float
    """Of the base's weights, as one worker keeps them on its device."""
    loading: float
    """Of one worker's process, at most, until its first step: with the optimizer's moments where they lie on the host."""
    export: float
    """Of the driver, at most, while it writes and proves an export."""


def estimate_host_memory(
    plan: FreezePlan,
    shape: ModelShape,
    config: TrainConfig,
    placement: Placement,
    *,
    world_size: int,
    device_type: str,
) -> HostEstimate:
    """Predicts what a worker's host and the driver's need under a placement."""
    shard = count_shard_bytes(plan, shape, config, placement, world_size=world_size)
    shards = world_size // config.num_replicas if placement.parallelism == "shard" else 1
    is_merged = any(layer.routed_copies for layer in shape.layers)  # stacked experts are made of tensors of their own
    merging = 2 * _FLOAT32 * shape.largest_layer_params / shards if is_merged else 0.0
    moments = (8 if config.optimizer.type == "adamw" else 0.1) * count_trainable_params(plan, shape) / shards
    kept = 0.0 if device_type == "cuda" else shard + moments
    ends = shape.embedding_params + shape.head_params + shape.final_norm_params + shape.other_params
    running = _FLOAT32 * (ends + shape.largest_layer_params)
    trains_ends = plan.train_embeddings or trains_head(plan)
    largest = max(shape.head_matrix_params if trains_ends else 0, shape.largest_layer_params)
    return HostEstimate(
        shard=shard,
        loading=PROCESS_BYTES + kept + READING_BYTES + merging,
        export=PROCESS_BYTES + READING_BYTES + max(running, 3 * _FLOAT32 * largest),
    )


def count_shard_bytes(
    plan: FreezePlan, shape: ModelShape, config: TrainConfig, placement: Placement, *, world_size: int
) -> float:
    """Bytes of weights and float32 masters that one worker keeps."""
    width = 4 if config.compute_dtype == "float32" else 2
    trained = count_trainable_params(plan, shape)
    frozen = shape.total_params - trained
    if placement.parallelism == "replicate":
        return float(trained * (width if width == _FLOAT32 else width + _FLOAT32) + frozen * width)
    shards = world_size // config.num_replicas
    return trained * _FLOAT32 / shards + frozen * width / (shards if placement.frozen_sharding == "shard" else 1)
