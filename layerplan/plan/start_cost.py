"""What prompts with a label cost when each trains from its own layer: counted from the layers really propagated through.

Two numbers, which differ: the depth that backward reaches, which is what SALF's paper calls cost, and FLOPs. A row that
starts at layer e reaches L - e layers whatever of them trains; LIFT computes no weight gradients above its one layer, and
so saves more FLOPs than depth. The head runs at one position of a row, and is left out on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from layerplan.config.base import StrictModel
from layerplan.plan.cost import predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape


class CostSaving(StrictModel):
    """Shares of a full backward pass through the decoder layers that were not run."""

    depth: float
    """By the layers reached: the mean start layer over the number of layers (the paper's number)."""
    flops: float
    """By the FLOPs of the layers' backward passes."""


def compute_saving(
    starts: Mapping[int, int] | Sequence[int],
    plan: FreezePlan,
    shape: ModelShape,
    *,
    seq_len: int,
    trains_alone: bool = False,
    trains_adapters: bool = False,
) -> CostSaving:
    """The saving of rows by their start layers, beside full training of every decoder layer.

    Args:
        starts: Start layer of each row, or rows by start layer.
        plan: What trains at most.
        shape: Sizes of the model.
        seq_len: Tokens of a row that are counted: attention grows with them.
        trains_alone: Whether of the layers from the start layer on only that one trains.
        trains_adapters: Whether the layers' own weights are frozen under small adapters, which are not counted.
    """
    counts = Counter(starts) if not isinstance(starts, Mapping) else Counter(dict(starts))
    num_rows, num_layers = sum(counts.values()), shape.num_layers
    every = plan.model_copy(update=_frozen_ends() | {"trainable_layers": tuple(range(num_layers))})
    full = _backward_flops(every, shape, seq_len, weights=True)
    spent = 0.0
    for start, count in counts.items():
        layers = [layer for layer in plan.trainable_layers if layer >= start]
        layers = [start] if trains_alone else layers
        at_start = every.model_copy(update={"trainable_layers": tuple(layers)})
        spent += count * _backward_flops(at_start, shape, seq_len, weights=not trains_adapters)
    mean_start = sum(start * count for start, count in counts.items()) / num_rows
    return CostSaving(depth=mean_start / num_layers, flops=1 - spent / (num_rows * full))


def count_row_flops(
    starts: Sequence[int], plan: FreezePlan, shape: ModelShape, *, seq_len: int, trains_alone: bool = False
) -> float:
    """Forward and backward FLOPs per token of the mean row, the head at one position."""
    saving = compute_saving(starts, plan, shape, seq_len=seq_len, trains_alone=trains_alone)
    every = plan.model_copy(update=_frozen_ends() | {"trainable_layers": tuple(range(shape.num_layers))})
    forward = predict_cost(every, shape, seq_len=seq_len).forward_flops - 2.0 * shape.head_matrix_params
    head = 3 * 2.0 * shape.head_matrix_params / seq_len
    return forward + head + (1 - saving.flops) * _backward_flops(every, shape, seq_len, weights=True)


def _backward_flops(plan: FreezePlan, shape: ModelShape, seq_len: int, *, weights: bool) -> float:
    cost = predict_cost(plan, shape, seq_len=seq_len)
    activations = cost.backward_activation_flops - 2.0 * shape.head_matrix_params
    return activations + (cost.backward_weight_flops if weights else 0.0)


def _frozen_ends() -> dict[str, Any]:
    """Fields of a plan whose embeddings, norm and head are frozen and which does not change."""
    ends: dict[str, Any] = dict.fromkeys(("train_embeddings", "train_final_norm", "train_lm_head"), False)
    return ends | {"trainable_modules": {}, "phases": (), "planned_steps": None}
