"""What a step of a plan takes on so many nodes, by arithmetic over plan, shape, config and the cluster's rates.

The global batch stays the same. Collectives are rings in the order of nodes: each link carries what one worker sends, the
link of a node no more than that of a worker. Of a hybrid placement, gathers stay within a node and only sums of shards cross
it. Where communication hides behind compute, the first unit and what compute does not cover are exposed; latency of many
small messages is not counted, so that the largest counts of nodes are bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerplan.config.train import TrainConfig
from layerplan.plan.attention import expect_attention
from layerplan.plan.cluster_rates import CORE_TOKENS_PER_S, DATA_CORES, ClusterRates
from layerplan.plan.communication import GRADIENT_BYTES, predict_communication
from layerplan.plan.cost import count_trainable_params, predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.memory import HEADROOM, choose_placement
from layerplan.plan.micro_batch import choose_micro_rows, settle_micro_rows
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement

OPTIMIZER_BYTES = 28
"""AdamW in float32 reads weight, gradient and two moments, and writes three."""
_FROZEN = {"replicate": "whole", "shard": "sharded"}
SATURATED = 0.5
"""Share of the first efficiency below which more nodes are called waste."""


@dataclass(frozen=True)
class ScalePoint:
    """A plan under one placement on so many nodes; seconds and bytes are of one step."""

    nodes: int
    workers: int
    placement: str
    compute_s: float
    communication_s: float
    """All of it."""
    exposed_s: float
    """What compute does not hide."""
    data_s: float
    """Waiting for rows."""
    checkpoint_s: float
    """What saves cost, spread over the steps between them."""
    memory: float
    """Of one worker, bytes."""
    fits: bool
    worker_bytes: float
    """That a worker sends within its node."""
    node_bytes: float
    """That a node sends to others."""
    gradient_bytes: float
    """That a worker sends of gradients, wherever to."""

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.compute_s + self.exposed_s + self.data_s + self.checkpoint_s

    @property
    def worker_seconds(self) -> float:
        """What a step costs."""
        return self.workers * self.step_s


def predict_scale(
    plan: FreezePlan, shape: ModelShape, config: TrainConfig, rates: ClusterRates, *, seq_len: int, nodes: int
) -> list[ScalePoint]:
    """Every placement on so many nodes; none when the batch cannot be dealt to their workers.

    Args:
        plan: What trains; of a plan with phases, the first.
        shape: Sizes of the model.
        config: Global batch, largest micro-batch, steps between checkpoints; how many workers it names is left out.
        rates: Of the cluster.
        seq_len: Tokens per row.
        nodes: Nodes, all of whose workers train.
    """
    workers = nodes * rates.workers_per_node
    if config.global_batch_size % workers:
        return []
    rows = config.global_batch_size // workers
    micro = max(size for size in range(1, min(rows, config.micro_rows) + 1) if rows % size == 0)
    options: list[tuple[str, str, int]] = [("replicate", "replicate", 1)]
    if workers > 1:
        options.append(("shard", "shard over all", 1))
    if nodes > 1 and rates.workers_per_node > 1:
        options.append(("shard", "shard per node", nodes))
    update = {"num_workers": workers, "micro_batch_size": micro}
    points = []
    for parallelism, name, replicas in options:
        here = config.model_copy(update=update | {"parallelism": parallelism, "num_replicas": replicas})
        if config.micro_batch_size == "auto":
            here = _settle_micro_batch(plan.at_step(0), shape, here, rates, seq_len=seq_len)
        points.append(_predict_point(plan.at_step(0), shape, here, rates, name, seq_len=seq_len, nodes=nodes))
    return points


def _settle_micro_batch(
    plan: FreezePlan, shape: ModelShape, config: TrainConfig, rates: ClusterRates, *, seq_len: int
) -> TrainConfig:
    workers, device_type = config.most_workers, "cuda" if rates.hides else "cpu"
    limits: dict[str, Any] = {"world_size": workers, "device_type": device_type, "available_bytes": rates.memory}
    limits["attention"] = expect_attention(config, seq_len=seq_len, device_type=device_type)
    return settle_micro_rows(config, choose_micro_rows(plan, shape, config, seq_len=seq_len, **limits))


def choose_best(points: Sequence[ScalePoint]) -> ScalePoint | None:
    """The quickest placement that fits."""
    return min((point for point in points if point.fits), key=lambda point: point.step_s, default=None)


def find_saturation(best: Sequence[ScalePoint]) -> ScalePoint | None:
    """The first point at which a step costs more than twice the worker seconds of the first one; None when none does."""
    return next((p for p in best if compute_efficiency(best[0], p) < SATURATED), None)


def compute_efficiency(first: ScalePoint, point: ScalePoint) -> float:
    """Worker seconds of a step on the fewest nodes, of those on more."""
    return first.worker_seconds / point.worker_seconds


def _predict_point(
    plan: FreezePlan,
    shape: ModelShape,
    config: TrainConfig,
    rates: ClusterRates,
    name: str,
    *,
    seq_len: int,
    nodes: int,
) -> ScalePoint:
    workers, device_type = config.most_workers, "cuda" if rates.hides else "cpu"
    placement, memory = choose_placement(
        plan,
        shape,
        config,
        seq_len=seq_len,
        world_size=workers,
        device_type=device_type,
        available_bytes=rates.memory,
        attention=expect_attention(config, seq_len=seq_len, device_type=device_type),
    )
    sent = predict_communication(plan, shape, config, placement, world_size=workers)
    worker_bytes, node_bytes = _split_links(sent.total, plan, shape, config, placement, nodes=nodes)
    cost = predict_cost(plan, shape, seq_len=seq_len)
    trained = count_trainable_params(plan, shape)
    is_replicated = placement.parallelism == "replicate"
    shards = 1 if is_replicated else workers // config.num_replicas
    tokens = config.global_batch_size * seq_len / workers
    recomputed = placement.count_recomputed(cost.forward_flops, shape.num_layers)
    passes_s = tokens * (cost.total_flops + recomputed) / rates.flops
    compute_s = passes_s + OPTIMIZER_BYTES * trained / shards / rates.memory_rate
    communication_s = _time_links(worker_bytes, node_bytes, config, placement, rates, nodes=nodes)
    micro_steps = config.global_batch_size // (workers * config.micro_rows)
    backward = (cost.total_flops - cost.forward_flops) / cost.total_flops / micro_steps
    exposed_s = communication_s
    if rates.hides:
        units = len(plan.trainable_layers) if is_replicated else shape.num_layers
        exposed_s = _expose(communication_s, passes_s * (backward if is_replicated else 1.0), max(1, units))
    rest_s = compute_s + exposed_s
    data_s = max(0.0, tokens * rates.workers_per_node / (DATA_CORES * CORE_TOKENS_PER_S) - rest_s)
    writing_s = cost.checkpoint_bytes / (nodes * rates.storage)
    every = config.checkpoint_every_steps
    stall_s = cost.checkpoint_bytes / shards / rates.copy + max(0.0, writing_s - every * (rest_s + data_s))
    frozen = "" if is_replicated or not plan.frozen_layers else f", frozen {_FROZEN[placement.frozen_sharding]}"
    return ScalePoint(
        nodes=nodes,
        workers=workers,
        placement=name + frozen,
        compute_s=compute_s,
        communication_s=communication_s,
        exposed_s=exposed_s,
        data_s=data_s,
        checkpoint_s=stall_s / every,
        memory=memory.total,
        fits=memory.total <= HEADROOM * rates.memory,
        worker_bytes=worker_bytes,
        node_bytes=node_bytes,
        gradient_bytes=sent.reduced,
    )


def _split_links(
    total: float, plan: FreezePlan, shape: ModelShape, config: TrainConfig, placement: Placement, *, nodes: int
) -> tuple[float, float]:
    """Bytes that a worker sends within its node, and a node to others."""
    if nodes == 1:
        return total, 0.0
    if placement.parallelism == "replicate" or config.num_replicas == 1:
        return total, total
    sums = 2 * (nodes - 1) / nodes * GRADIENT_BYTES * count_trainable_params(plan, shape)
    shards = config.most_workers // config.num_replicas
    return total - sums / shards, sums


def _time_links(
    worker_bytes: float,
    node_bytes: float,
    config: TrainConfig,
    placement: Placement,
    rates: ClusterRates,
    *,
    nodes: int,
) -> float:
    """Seconds of all communication: of one ring its slowest link, of two after each other both."""
    inside_s = worker_bytes / rates.inside if rates.workers_per_node > 1 else 0.0
    between_s = node_bytes / rates.between
    is_hybrid = placement.parallelism == "shard" and config.num_replicas > 1
    return inside_s + between_s if is_hybrid else max(inside_s, between_s)


def _expose(communication_s: float, hidden_by_s: float, units: int) -> float:
    """What compute beside it does not hide: the first unit, and what is left when compute has ended."""
    first = communication_s / units
    return first + max(0.0, communication_s - first - hidden_by_s)
