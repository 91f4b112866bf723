"""How a run uses its workers: what is sharded, and which layers recompute their activations.

A layer stores activations when gradients pass through it, trained or not; a frozen prefix stores none. Recomputing a
layer costs one forward pass of it whatever the plan says, so the layers that store most are the cheapest to recompute
per byte: trained layers, which also keep the inputs of their matrices, come before frozen ones on the path.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerplan.plan.freeze_plan import FreezePlan


@dataclass(frozen=True)
class Placement:
    """How this run uses its workers; the outcome of every `auto`."""

    parallelism: str
    """`replicate` or `shard`."""
    frozen_sharding: str
    """`replicate` or `shard`; means something under `shard` only."""
    attention: str = "sdpa"
    """`sdpa`, `flex` or `eager`."""
    checkpointed_layers: tuple[int, ...] = ()
    """Decoder layers whose activations are recomputed."""


def choose_layers(
    plan: FreezePlan, mode: str, *, bytes_to_save: float, trained_layer_bytes: float, frozen_layer_bytes: float
) -> tuple[int, ...]:
    """Returns the layers to recompute.

    Args:
        plan: Its gradient path starts at the lowest trained layer, or at 0 when the input embedding trains.
        mode: `none`, `full` (the whole path) or `auto`.
        bytes_to_save: With `auto`, how many bytes the stored activations exceed the memory by.
        trained_layer_bytes: What a trained layer stores.
        frozen_layer_bytes: What a frozen layer on the path stores.
    """
    path = gradient_path(plan)
    if mode == "none":
        return ()
    if mode == "full":
        return path
    trained = set(plan.trainable_layers)
    by_saving = sorted(path, key=lambda layer: (layer not in trained, layer))
    chosen, saved = [], 0.0
    for layer in by_saving:
        if saved >= bytes_to_save:
            break
        chosen.append(layer)
        saved += trained_layer_bytes if layer in trained else frozen_layer_bytes
    return tuple(sorted(chosen))


def gradient_path(plan: FreezePlan) -> tuple[int, ...]:
    """Decoder layers that backward passes through."""
    first = 0 if plan.train_embeddings else min(plan.trainable_layers, default=plan.model.num_layers)
    return tuple(range(first, plan.model.num_layers))
