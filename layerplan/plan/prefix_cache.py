"""What keeping the output of a frozen prefix on disk would save and cost: pure functions over plan, shape and config.

A frozen prefix gives the same states for the same row in every epoch. Read from a disk they cost bytes where computing them
costs FLOPs: a layer of width D some 24 D^2 FLOPs for each token, its output 2 D bytes whatever lies below.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerplan.config.train import TrainConfig
from layerplan.plan.cost import GIB, predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape

DISK_BYTES_PER_S = 200e6
"""Read and written by one worker: a disk of the cloud, or a shared file system with a few workers."""
WORTH = 2.0
"""How many times over what the disk takes has to be saved."""
DISK_SHARE = 0.5
"""Of the free disk that the rows may fill."""
RECORD_HEAD_BYTES = 16
_WIDTH = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class PrefixPrice:
    """Of one worker, seconds; of all of them, bytes."""

    num_bytes: int
    """On the disk, of all rows."""
    saved_s: float
    """Computing the prefix again for rows that come again."""
    disk_s: float
    """Writing every row once and reading it as often as it comes again."""

    @property
    def pays(self) -> bool:
        """Whether reading is predicted to be worth it."""
        return self.saved_s >= WORTH * self.disk_s

    def __str__(self) -> str:
        return (
            f"{self.num_bytes / GIB:,.2f} GiB on disk, predicted to save {self.saved_s:,.0f} s of a worker's prefix for"
            f" {self.disk_s:,.0f} s of its disk"
        )


def find_cut(plan: FreezePlan, num_layers: int) -> int:
    """The first decoder layer that any phase trains; all layers lie below it when none does."""
    phases = [phase for _, phase in plan.list_distinct_phases()]
    return min((min(phase.trainable_layers, default=num_layers) for phase in phases), default=num_layers)


def find_plan_fault(plan: FreezePlan, num_layers: int) -> str:
    """Why no prefix of the layers gives the same in every epoch; empty when one does."""
    if find_cut(plan, num_layers) == 0:
        return "layer 0 trains, so no layer below what trains is frozen"
    for start, phase in plan.list_distinct_phases():
        if phase.train_embeddings or phase.tied in ("trained", "head_only"):
            where = f" in the phase from step {start}" if plan.phases else ""
            return f"the input embedding trains{where}, or the matrix it shares with the head"
    return ""


def price_prefix(
    plan: FreezePlan,
    shape: ModelShape,
    config: TrainConfig,
    *,
    seq_len: int,
    num_rows: int,
    world_size: int,
    flops_per_s: float,
) -> PrefixPrice:
    """Predicts what a cache of the frozen prefix's output saves and costs.

    Args:
        plan: What trains.
        shape: Sizes of the model.
        config: Training section.
        seq_len: Tokens per row.
        num_rows: Of the store.
        world_size: Workers.
        flops_per_s: Of one worker.
    """
    cut = find_cut(plan, shape.num_layers)
    record = seq_len * shape.hidden_size * _WIDTH[config.compute_dtype] + RECORD_HEAD_BYTES
    taken = config.max_steps * config.global_batch_size
    kept = min(taken, num_rows)
    again = taken - kept
    forward = predict_cost(plan, shape, seq_len=seq_len).forward_flops
    layers = sum(shape.layers[layer].matrix_params for layer in range(shape.num_layers))
    below = sum(shape.layers[layer].matrix_params for layer in range(cut))
    flops = (forward - 2.0 * shape.head_matrix_params) * below / max(1, layers)
    return PrefixPrice(
        num_bytes=num_rows * record,
        saved_s=again * seq_len * flops / flops_per_s / world_size,
        disk_s=(kept + again) * record / DISK_BYTES_PER_S / world_size,
    )
