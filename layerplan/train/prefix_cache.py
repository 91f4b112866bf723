"""`train.cache_prefix`: the output of a frozen prefix is kept from the first epoch on and read in later ones, bit for bit.

What is read comes with the rows, in the thread that prepares coming steps; what is not there is computed as always and
written beside the next step. The file lies in the run's folder, which workers of several nodes share or not: a row that
is missing is just computed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from layerplan.corpus.manifest import Manifest
from layerplan.corpus.rows import PackedRows
from layerplan.errors import TrainingError
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.prefix_cache import DISK_SHARE, find_cut, find_plan_fault, price_prefix
from layerplan.run_folder import PREFIX_CACHE_NAME
from layerplan.train.agreement import agree_on_fault
from layerplan.train.build import BuiltModel
from layerplan.train.prefix_pass import DEPENDS_ON_OTHERS, Prefix, find_prefix_fault
from layerplan.train.request import TrainRequest
from layerplan.train.row_states import RowStates
from layerplan.train.sharding import reshard
from layerplan.train.step import TensorBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedPass:
    """How one micro-batch goes through the prefix: by states that were read, or computed and handed on."""

    prefix: Prefix
    states_BTD: Tensor | None
    keep: Callable[[Tensor], None]

    def running(self, device: torch.device) -> AbstractContextManager[None]:
        """Within it the model runs so."""
        if self.states_BTD is None:
            return self.prefix.noting(self.keep)
        return self.prefix.replaced_by(self.states_BTD.to(device, non_blocking=True))


@dataclass
class PrefixCache:
    """The states of one worker's rows."""

    prefix: Prefix
    states: RowStates
    num_read: int = 0
    num_computed: int = 0

    def attach(self, rows: PackedRows, batches: Sequence[TensorBatch]) -> list[TensorBatch]:
        """Micro-batches with what is known of their rows; they are the rows in order, cut."""
        found, start = [], 0
        for batch in batches:
            stop = start + len(batch.input_ids_BT)
            found.append(self._attach_one(rows.row_ids[start:stop], batch))
            start = stop
        assert start == len(rows), "a micro-batch is rows of the step, in order"
        return found

    def close(self, *, is_done: bool) -> None:
        """Ends the writing; removes the file once nobody needs it any more."""
        self.states.close()
        logger.info("prefix cache: %s rows read, %s computed", f"{self.num_read:,}", f"{self.num_computed:,}")
        if is_done:
            self.states.path.unlink(missing_ok=True)

    def _attach_one(self, row_ids: NDArray[np.int64], batch: TensorBatch) -> TensorBatch:
        # kernels may differ by how many rows there are, and by whether a mask tells documents apart
        beside = f"{tuple(batch.input_ids_BT.shape)} {batch.position_ids_BT is None}"
        states = self.states.read(row_ids, beside)
        if states is None:
            self.num_computed += len(row_ids)
        else:
            self.num_read += len(row_ids)
            states = states.pin_memory() if batch.input_ids_BT.is_cuda else states

        def keep(computed: Tensor) -> None:
            self.states.write(row_ids, computed, beside)

        return replace(batch, cached=CachedPass(self.prefix, states, keep))


def open_prefix_cache(
    request: TrainRequest, built: BuiltModel, shape: ModelShape, *, flops_per_s: float, world_size: int
) -> PrefixCache | None:
    """The cache of a phase, where the config wants one and it is exact; asks the placed model, on every rank.

    Raises:
        TrainingError: When the config says `on` and it cannot be.
    """
    wish = request.config.cache_prefix
    if wish == "off":
        return None
    manifest = Manifest.load(request.store)
    price = price_prefix(
        request.plan,
        shape,
        built.config,
        seq_len=manifest.seq_len,
        num_rows=manifest.num_rows,
        world_size=world_size,
        flops_per_s=flops_per_s,
    )
    path = request.run_dir / PREFIX_CACHE_NAME / "rows.bin"
    fault = find_fault(request, built, manifest, shape, world_size) or find_disk_fault(path, price.num_bytes)
    if not fault and wish == "auto" and not price.pays:
        fault = f"it does not pay: {price}"
    fault = agree_on_fault(fault, world_size)  # the passes below gather what is sharded of the trained layers
    prefix = None
    if not fault:
        prefix = Prefix(built.placed.model.causal_lm, find_cut(request.plan, shape.num_layers))
        trial = {"rows": built.config.micro_rows if built.recipe.rows != "reset" else 1, "seq_len": manifest.seq_len}
        found = find_prefix_fault(built.placed.model, prefix, device=built.device, **trial)
        fault = agree_on_fault(found, world_size)
        reshard(built.placed.model)
    if fault and wish == "on":
        raise TrainingError(f"train.cache_prefix=on: {fault}; auto and off train without it")
    if fault or prefix is None:
        logger.info("prefix cache: off, %s", fault)
        return None
    circumstances = describe_circumstances(request, built, manifest, shape)
    try:
        states = RowStates(path, circumstances=circumstances, row_shape=prefix.row_shape, dtype=prefix.dtype)
    except OSError as error:
        logger.warning("prefix cache: off, %s cannot be opened (%s)", path, error.strerror or error)
        return None
    logger.info("prefix cache: %s", price)
    return PrefixCache(prefix, states)


def find_fault(request: TrainRequest, built: BuiltModel, manifest: Manifest, shape: ModelShape, world_size: int) -> str:
    """Why nothing can be kept, by plan, rows and placement; empty when it can."""
    if request.labels is not None:
        return "finetune: rows are prompts that train from layers of their own"
    if manifest.mode != "store":
        return "corpus.mode=on_the_fly: rows are made while training, none comes again"
    if fault := find_plan_fault(request.plan, shape.num_layers):
        return fault
    if request.config.max_steps * request.config.global_batch_size <= manifest.num_rows:
        return f"no row comes again: {request.config.max_steps:,} steps read less than the store's {manifest.num_rows:,} rows"
    cut = find_cut(request.plan, shape.num_layers)
    if built.config.micro_rows > 1 and any(layer.routed_copies for layer in shape.layers[:cut]):
        return f"experts are given the tokens of a micro-batch together: {DEPENDS_ON_OTHERS}"
    if built.recipe.rows == "alone":
        return "the model reads one document per row, so the rows of the store are taken apart"
    if built.placement.parallelism == "shard" and built.placement.frozen_sharding == "shard" and world_size > 1:
        return "frozen layers are sharded, and all workers gather them together; train.frozen_sharding=replicate"
    return ""


def find_disk_fault(path: Path, num_bytes: int) -> str:
    """Why the disk is too small; empty when it is not."""
    folder = next(each for each in path.parents if each.exists())
    here = path.stat().st_blocks * 512 if path.exists() else 0
    free = shutil.disk_usage(folder).free + here
    if num_bytes <= DISK_SHARE * free:
        return ""
    return f"its {num_bytes:,} bytes are more than half of the {free:,} that are free in {folder}"


def describe_circumstances(request: TrainRequest, built: BuiltModel, manifest: Manifest, shape: ModelShape) -> str:
    """What decides the bits of a row's states: model, rows, where the prefix ends, kernels and machine."""
    device = built.device
    machine = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    parts = (
        request.plan.model.model_dump_json(),
        manifest.content_sha256,
        find_cut(request.plan, shape.num_layers),
        built.config.compute_dtype,
        built.config.compiles,
        built.config.frozen_fp8,
        built.config.mamba_kernels,
        built.placement.attention,
        built.recipe.text,
        request.document_mask,
        machine,
        torch.get_num_threads() if device.type == "cpu" else 0,
        torch.__version__,
        transformers.__version__,
    )
    return "\n".join(map(str, parts))
