"""How a run uses its workers: what is sharded, and which layers recompute their activations.

A layer stores activations when gradients pass through it, trained or not; a frozen prefix stores none. Recomputing a
layer costs one forward pass of it whatever the plan says, so the layers that store most are the cheapest to recompute
per byte: among equals trained layers, which also keep the inputs of their matrices, come before frozen ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerplan.config.train import TrainConfig
from layerplan.plan.freeze_plan import FreezePlan


@dataclass(frozen=True)
class Placement:
    """How this run uses its workers; the outcome of every `auto`."""

    parallelism: str
    """`replicate` or `shard`."""
    frozen_sharding: str
    """`replicate` or `shard`; means something under `shard` only."""
    attention: str = "sdpa"
    """As `train.attention` names it; or by what it keeps (`name_kept` in `layerplan/plan/attention.py`)."""
    checkpointed_layers: tuple[int, ...] = ()
    """Decoder layers whose activations are recomputed."""
    reduces_each: bool = False
    """Whether shards take their part of the gradients after every micro-batch: sent more often, and never held whole."""

    def explain_unused(self, config: TrainConfig) -> str:
        """What a config says of shards where there are none; empty where it says nothing, or there are some."""
        if self.parallelism == "shard":
            return ""
        asked = [f"train.num_replicas={config.num_replicas}"] if config.num_replicas > 1 else []
        asked += ["train.frozen_sharding=shard"] if config.frozen_sharding == "shard" else []
        if not asked:
            return ""
        return f"{' and '.join(asked)} {'do' if len(asked) > 1 else 'does'} nothing without train.parallelism=shard"

    def count_recomputed(self, forward_flops: float, num_layers: int) -> float:
        """FLOPs that are computed once more, of a forward pass of so many FLOPs through so many layers."""
        return forward_flops * len(self.checkpointed_layers) / num_layers


def choose_layers(
    plan: FreezePlan, mode: str, *, bytes_to_save: float, layer_bytes: Mapping[int, float]
) -> tuple[int, ...]:
    """Returns the layers to recompute.

    Args:
        plan: Its gradient path starts at the lowest trained layer, or at 0 when the input embedding trains.
        mode: `none`, `full` (the whole path) or `auto`.
        bytes_to_save: With `auto`, how many bytes the stored activations exceed the memory by.
        layer_bytes: What recomputing saves of each layer on the path.
    """
    path = gradient_path(plan)
    if mode == "none":
        return ()
    if mode == "full":
        return path
    by_saving = sorted(path, key=lambda layer: (-layer_bytes[layer], layer))
    chosen, saved = [], 0.0
    for layer in by_saving:
        if saved >= bytes_to_save:
            break
        chosen.append(layer)
        saved += layer_bytes[layer]
    return tuple(sorted(chosen))


def gradient_path(plan: FreezePlan) -> tuple[int, ...]:
    """Decoder layers that backward passes through."""
    first = 0 if plan.train_embeddings else min(plan.trainable_layers, default=plan.model.num_layers)
    return tuple(range(first, plan.model.num_layers))
