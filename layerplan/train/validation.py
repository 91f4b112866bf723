"""Mean next-token loss over the held-out rows, spread over the ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from layerplan.corpus.rows import PADDING, PackedRows
from layerplan.train.sharding import reshard
from layerplan.train.step import LossModel, TensorBatch, fill_up


def compute_validation_loss(
    model: LossModel,
    rows: PackedRows,
    *,
    micro_batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> float:
    """Returns nats per label; each rank takes every world_size-th row.

    Every rank runs the same number of forward passes, as sharded layers are gathered together; a rank without a row
    of its own runs one whose positions are all padding.
    """
    size = micro_batch_size * world_size
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), size):
            mine = rows.take(start + rank, min(start + size, len(rows)))
            mine = _every(mine, world_size) if len(mine) else _blank(rows)
            batches = model.make_batches(mine, micro_batch_size, device)
            for batch in _equalise(batches, model, device, world_size):
                total[0] += model(batch).double()
                total[1] += batch.num_labels
    model.train()
    reshard(model)
    if world_size > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1].clamp_min(1))


def compute_row_losses(
    model: LossModel, rows: PackedRows, *, device: torch.device, rank: int = 0, world_size: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Summed loss of every row by itself, so that models can be compared row by row; the same on every rank.

    Returns:
        (R,) nats, and (R,) labels that they are summed over.
    """
    found = torch.zeros((len(rows), 2), dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), world_size):
            mine = rows.take(start + rank, start + rank + 1)
            batches = model.make_batches(mine if len(mine) else _blank(rows), 1, device)
            for batch in _equalise(batches, model, device, world_size):
                loss = model(batch).double()
                if len(mine):
                    found[start + rank, 0] += loss
                    found[start + rank, 1] += batch.num_labels
    model.train()
    reshard(model)
    if world_size > 1:
        dist.all_reduce(found)
    nats, labels = found.cpu().numpy().T
    return nats, labels.astype(np.int64)


def _equalise(batches: list[TensorBatch], model: LossModel, device: torch.device, world_size: int) -> list[TensorBatch]:
    """As many micro-batches on every rank, where a row may be one or several: elsewhere they are that already."""
    if model.recipe.rows not in ("alone", "reset") or world_size == 1:
        return batches
    most = torch.tensor([len(batches)], device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return fill_up(batches, int(most), device)


def _every(rows: PackedRows, step: int) -> PackedRows:
    return rows.select(slice(None, None, step))


def _blank(rows: PackedRows) -> PackedRows:
    one = rows.take(0, 1)
    return replace(one, document_ids=np.full_like(one.document_ids, PADDING))
