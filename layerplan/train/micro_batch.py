"""`train.micro_batch_size: auto` in a run: a predicted size is tried by one real step, halved where memory runs out, and kept.

Memory ends in three ways. An allocation fails where ranks need nothing of each other (one worker, or replicas): all try
half at once. It fails while others wait in a collective (sharded workers, or a later step): half is written down and the
attempt ends. The system kills the process: the size it was trying is found at the next start, and half of it is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from layerplan.corpus.rows import PackedRows
from layerplan.errors import TrainingError
from layerplan.plan.memory import explain_shortage
from layerplan.train.agreement import agree_on_fault
from layerplan.train.build import BuiltModel
from layerplan.train.known_rows import KnownRows, load_known
from layerplan.train.out_of_memory import OutOfMemoryError, is_out_of_memory
from layerplan.train.request import TrainRequest
from layerplan.train.step import accumulate_gradients

logger = logging.getLogger(__name__)


def find_most_rows(run_dir: Path, rank: int, world_size: int) -> int | None:
    """The most that may be tried, the same on every rank; None when nothing was tried before."""
    found: list[int | None] = [None]
    if rank == 0 and (known := load_known(run_dir)) is not None:
        found = [known.rows]
        if known.state == "trying":
            found = [max(1, known.rows // 2)]
            logger.info(
                "micro-batch: an attempt ended while it tried %d rows for the first time; %d now", known.rows, *found
            )
    if world_size > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def build_to_fit(
    build: Callable[..., BuiltModel],
    request: TrainRequest,
    *,
    seq_len: int,
    rank: int,
    world_size: int,
    forget: Callable[[], None],
) -> BuiltModel:
    """Builds the model, with `auto` once more for each size that does not fit; a collective.

    Args:
        build: Makes the model; `most_rows` limits a micro-batch, None to what is predicted to fit.
        request: The run.
        seq_len: Tokens per row.
        rank: Of this worker.
        world_size: Workers.
        forget: Frees the memory of a model that was let go of.

    Raises:
        TrainingError: When one row does not fit, or sharded workers have to start again with fewer.
    """
    if request.config.micro_batch_size != "auto":
        return build()
    run_dir = request.run_dir
    most = find_most_rows(run_dir, rank, world_size)
    known = load_known(run_dir) if rank == 0 else None
    while True:
        built = build(most_rows=most)
        rows = built.config.micro_rows
        if rank == 0 and (known is None or (known.rows, known.state) != (rows, "fits")):
            KnownRows(rows, "trying").save(run_dir)
        try:
            error = try_step(built, seq_len)
        except Exception:
            if rank == 0:
                KnownRows(rows, "next").save(run_dir)  # it says nothing about memory
            raise
        alone = world_size == 1 or built.placement.parallelism == "replicate"
        if error is not None and (rows == 1 or not alone):
            raise note_shortage(built, run_dir, error)
        if not agree_on_fault("" if error is None else "out of memory", world_size):
            if rank == 0:
                KnownRows(rows, "fits").save(run_dir)
                logger.info("micro-batch: %d rows (auto: a step of it fits)", rows)
            return built
        most = rows // 2
        if rank == 0:
            logger.info("micro-batch: %d rows do not fit into memory; %d at most", rows, most)
        built.placed.release()
        del built, error
        forget()


@contextmanager
def noting_shortage(built: BuiltModel, request: TrainRequest) -> Iterator[None]:
    """Writes down half of the rows where memory runs out in a later step, for the attempt that comes after."""
    try:
        yield
    except OutOfMemoryError as error:
        if request.config.micro_batch_size != "auto":
            raise
        raise note_shortage(built, request.run_dir, error) from error


def note_shortage(built: BuiltModel, run_dir: Path, error: BaseException) -> TrainingError:
    """The error to end an attempt with, whose successor takes half of the rows; there is none to take below one."""
    rows = built.config.micro_rows
    shortage = explain_shortage(built.estimate, built.available_bytes, built.config)
    if rows == 1:
        return OutOfMemoryError(f"out of memory with one row per forward pass. {shortage}")
    KnownRows(rows // 2, "next").save(run_dir)
    text = str(error) if isinstance(error, OutOfMemoryError) else f"out of memory. {shortage}"
    return OutOfMemoryError(f"micro-batch of {rows} rows: {text}. The next attempt takes {rows // 2} at most")


def try_step(built: BuiltModel, seq_len: int) -> BaseException | None:
    """One forward and backward pass over a micro-batch and an update that changes nothing; what memory failed with, or None.

    Raises:
        Exception: What is no lack of memory.
    """
    placed, optimizer, device = built.placed, built.optimizer, built.device
    is_sharded = built.placement.parallelism == "shard"
    try:
        rows = make_trial_rows(built, seq_len)
        batches = placed.model.make_batches(rows, built.config.micro_rows, device)
        if is_sharded and placed.model.makes_several(built.config, dist.get_world_size()):
            batches = batches * 2  # the first leaves its gradients whole
        # replicas must not wait for each other here: one may have no room for what another has
        set_sync = placed.set_sync if is_sharded else None if placed.set_sync is None else _never(placed.set_sync)
        accumulate_gradients(placed.model, batches, 1.0, set_sync)
        one = torch.ones((), dtype=torch.float32, device=device)
        optimizer.step(grad_scale=one, found_inf=one)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except BaseException as error:
        if not is_out_of_memory(error):
            raise
        return error.with_traceback(None)  # whose frames hold the activations
    finally:
        optimizer.zero_grad(set_to_none=True)
    return None


def make_trial_rows(built: BuiltModel, seq_len: int) -> PackedRows:
    """A micro-batch of full rows, two documents in each; of prompts with a label, one that trains all it may."""
    size = built.config.micro_rows
    columns = np.tile(np.arange(seq_len, dtype=np.int32), (size, 1))
    half = max(1, seq_len // 2)
    documents, positions = (columns >= half).astype(np.int32), np.where(columns >= half, columns - half, columns)
    starts = None
    if built.has_labels:
        documents, positions = np.zeros_like(columns), columns
        starts = np.full(size, min(built.plan.trainable_layers, default=0), dtype=np.int32)
    ids = np.zeros_like(columns)
    return PackedRows(np.arange(size, dtype=np.int64), ids, documents, positions.astype(np.int32), starts)


def _never(set_sync: Callable[[bool], None]) -> Callable[[bool], None]:
    return lambda is_last: set_sync(False)
