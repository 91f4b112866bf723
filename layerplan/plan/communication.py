"""Bytes one worker sends in a step under a placement: pure functions over plan, shape and config.

Collectives are counted as rings: of N bytes over W workers, a gather or a scatter sends N (W - 1) / W, an all-reduce
twice that; gloo's scatter does too.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerplan.config.train import TrainConfig
from layerplan.plan.cost import count_trainable_params
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement, gradient_path
from layerplan.plan.trained_part import count_trained_layer_params, count_trained_params

GLOO_SCATTER = 2
"""Gloo scatters sums by an all-reduce of which each keeps its part, as counted on an interface with two and three ranks."""
GRADIENT_BYTES = 4
"""Gradients are summed in float32, by FSDP2 and by the buckets of replicas."""


@dataclass(frozen=True)
class CommunicationCost:
    """Predicted bytes one worker sends per optimizer step."""

    gathered: float
    """Parameters collected from their shards, for forward and again for backward."""
    reduced: float
    """Gradients of what trains; frozen parameters send none."""

    @property
    def total(self) -> float:
        """Both."""
        return self.gathered + self.reduced


def predict_communication(
    plan: FreezePlan, shape: ModelShape, config: TrainConfig, placement: Placement, *, world_size: int
) -> CommunicationCost:
    """Predicts what one worker sends in one optimizer step.

    A trained layer's shards are gathered for forward and for backward of every micro-batch. A frozen layer's are too,
    when they are sharded: once for forward and once more while gradients pass through it, unless it lies above a
    trained one and stays gathered in between.
    """
    trained = count_trainable_params(plan, shape)
    width = 2 if config.compute_dtype == "bfloat16" else 4
    micro_steps = -(-config.global_batch_size // (world_size * config.micro_rows))
    if placement.parallelism == "replicate":
        return CommunicationCost(0.0, 2 * _ring(world_size) * GRADIENT_BYTES * trained)
    shards = world_size // config.num_replicas
    gathered = 2.0 * trained
    if placement.frozen_sharding == "shard":
        path, lowest = set(gradient_path(plan)), min(plan.trainable_layers, default=shape.num_layers)
        for layer in plan.frozen_layers:
            again = layer in path and layer < lowest
            gathered += shape.layer_params(layer) * (2 if again else 1)
        layers = shape.count_layer_params(range(shape.num_layers))
        for layer in plan.trainable_modules:
            gathered += 2 * (shape.layer_params(layer) - count_trained_params(plan, shape, layer))
        trained_ends = trained - count_trained_layer_params(plan, shape)
        gathered += max(0, shape.total_params - layers - trained_ends)
    scattered = (1 if config.use_gpu else GLOO_SCATTER) * _ring(shards) * trained
    reduced = scattered + 2 * _ring(config.num_replicas) * trained / shards
    if placement.reduces_each:
        reduced *= micro_steps
    return CommunicationCost(_ring(shards) * width * gathered * micro_steps, GRADIENT_BYTES * reduced)


def _ring(world_size: int) -> float:
    return (world_size - 1) / world_size
