"""What every training worker runs under Ray Train: build, restore, loop, save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn

from layerplan.checkpoint.dcp import load_checkpoint, save_checkpoint
from layerplan.checkpoint.layout import CHECKPOINTS_NAME, STATE_NAME, name_step, read_train_state, write_train_state
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.rows import PackedRows
from layerplan.corpus.store import load_validation_rows
from layerplan.corpus.stream import iter_rank_steps
from layerplan.errors import TrainingError
from layerplan.models.causal_lm import load_causal_lm
from layerplan.models.files import load_hf_config
from layerplan.models.freezing import AppliedPlan, apply_plan
from layerplan.plan.cost import predict_cost
from layerplan.plan.memory import GIB, MemoryEstimate, choose_placement, explain_shortage
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.ray_session import quiet_engines
from layerplan.train.attention import IMPLEMENTATIONS, choose_attention
from layerplan.train.ledger import LEDGER_NAME, LedgerWriter
from layerplan.train.loop import LoopHooks, LoopSetup, run_loop
from layerplan.train.optim import build_optimizer
from layerplan.train.request import TrainRequest
from layerplan.train.sharding import PlacedModel, place_model
from layerplan.train.state import TrainState
from layerplan.train.throughput import find_peak_flops

STOP_REQUEST = "stop_requested"
"""File in the run folder that asks the workers for a last checkpoint."""


@dataclass
class CheckpointWriter:
    """Saves in the background and commits through Ray: complete, or ignored."""

    run_dir: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    group: Any
    rank: int
    validated_steps: range = range(0)
    """Steps whose checkpoints Ray Train hands to the validation function."""
    newest: Path | None = None
    """Newest checkpoint this run has, restored or saved."""
    _pending: Any = None

    def save(self, state: TrainState) -> None:
        """Starts saving and hands the end of it to Ray's upload thread.

        Waits for the save before it: two at once would mix their collectives, and a checkpoint would lack tensors.
        """
        self._wait()
        name = name_step(state.step)
        folder = self.run_dir / CHECKPOINTS_NAME / name
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STATE_NAME).unlink(missing_ok=True)
        future = save_checkpoint(folder, self.model, self.optimizer, self.group)
        self._pending = future
        self.newest = folder

        def finish(checkpoint: Checkpoint, checkpoint_dir_name: str) -> Checkpoint:
            if future is not None:
                future.result()
            if self.rank == 0:
                write_train_state(folder, state.model_dump(mode="json"))
            return Checkpoint(str(folder))

        ray.train.report(
            {"step": state.step, "train_loss": state.last_loss, "validation_loss": state.validation_loss},
            checkpoint=Checkpoint(str(folder)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=finish,
            delete_local_checkpoint_after_upload=False,
            validation=state.step in self.validated_steps,
        )

    def restore(self, expected: TrainState) -> TrainState | None:
        """Loads the newest checkpoint into model and optimizer; None when there is none."""
        if self.newest is None:
            return None
        self._wait()
        dist.barrier()
        load_checkpoint(self.newest, self.model, self.optimizer)
        return expected.check_same_run(self._read_state())

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _read_state(self) -> dict[str, Any]:
        """Rank 0 writes the state in its upload thread, a moment after the shards are done."""
        import time

        assert self.newest is not None
        for _ in range(100):
            if (self.newest / STATE_NAME).exists():
                break
            time.sleep(0.1)
        return read_train_state(self.newest)


@dataclass(frozen=True)
class BuiltModel:
    """A placed model with its plan, its optimizer and what was predicted of it."""

    placed: PlacedModel
    applied: AppliedPlan
    optimizer: torch.optim.Optimizer
    placement: Placement
    estimate: MemoryEstimate
    available_bytes: float


def train_worker(loop_config: dict[str, Any]) -> None:
    """The train function of Ray Train."""
    request: TrainRequest = loop_config["request"]
    quiet_engines()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    manifest = Manifest.load(request.store)
    shape = ModelShape.from_hf_config(load_hf_config(request.model_path, revision=request.revision))
    num_nodes = count_ray_nodes(world_size)
    if rank == 0:
        print(f"[train] workers: {world_size} on {num_nodes} Ray node{'s' if num_nodes > 1 else ''}", flush=True)
    built = build_model(
        request,
        shape,
        device,
        seq_len=manifest.seq_len,
        rank=rank,
        world_size=world_size,
        local_world_size=context.get_local_world_size(),
    )
    fresh = TrainState(plan_sha256=request.plan.sha256, corpus_sha256=manifest.content_sha256)
    group = dist.new_group(backend="gloo")
    writer = CheckpointWriter(request.run_dir, built.placed.model, built.optimizer, group, rank)
    if request.validation is not None:
        writer.validated_steps = request.validation.steps
    restored = ray.train.get_checkpoint()
    if restored is not None:
        writer.newest = Path(restored.path)
    state = writer.restore(fresh) or fresh
    setup = LoopSetup(
        built.placed,
        built.optimizer,
        built.applied,
        request.config,
        device,
        rank,
        world_size,
        flops_per_token=predict_cost(request.plan, shape, seq_len=manifest.seq_len).total_flops,
        peak_flops=find_peak_flops(request.config, device),
        predicted_memory_gib=built.estimate.total / GIB,
        memory_advice=explain_shortage(built.estimate, built.available_bytes, request.config),
        profile_dir=request.run_dir / "profile" if rank == 0 else None,
    )
    run_with_sink(request, setup, state, writer)


def run_with_sink(request: TrainRequest, setup: LoopSetup, state: TrainState, writer: CheckpointWriter) -> None:
    """Opens the sink of rank 0, runs the loop, closes the sink."""
    sink = request.sink_factory(state.step) if setup.rank == 0 and request.sink_factory is not None else None
    ledger = None
    if request.config.write_ledger:
        path = request.run_dir / LEDGER_NAME
        ledger = LedgerWriter(path, start_step=state.step, rank=setup.rank, world_size=setup.world_size)

    def restore() -> TrainState | None:
        restored = writer.restore(state)
        if restored is not None and ledger is not None and setup.rank == 0:
            ledger.drop_after(restored.step)
        return restored

    def iter_steps(start: int, stop: int) -> Iterator[PackedRows]:
        return iter_rank_steps(
            request.store,
            num_lanes=request.config.global_batch_size,
            seed=request.seed,
            rank=setup.rank,
            world_size=setup.world_size,
            start_step=start,
            stop_step=stop,
        )

    hooks = LoopHooks(
        iter_steps=iter_steps,
        save=writer.save,
        should_stop=(request.run_dir / STOP_REQUEST).exists,
        sink=sink,
        validation=load_validation_rows(request.store),
        restore=restore,
        write_ledger=None if ledger is None else lambda step, rows: ledger.write(step, rows.row_ids),
    )
    try:
        run_loop(setup, state, hooks)
    finally:
        if sink is not None:
            sink.close()


def build_model(
    request: TrainRequest,
    shape: ModelShape,
    device: torch.device,
    *,
    seq_len: int,
    rank: int,
    world_size: int,
    local_world_size: int,
) -> BuiltModel:
    """Loads the base, applies the plan, settles the placement, and builds the optimizer, in this order.

    Raises:
        TrainingError: When the device lacks the dtype, or the prediction does not fit into memory.
    """
    config = request.config
    check_dtype(config.compute_dtype, device)
    available = agree_on_memory(find_available_bytes(device, local_world_size), device)
    placement, estimate = choose_placement(
        request.plan,
        shape,
        config,
        seq_len=seq_len,
        world_size=world_size,
        device_type=device.type,
        available_bytes=available,
    )
    if estimate.total > available:
        raise TrainingError(f"the run does not fit into memory. {explain_shortage(estimate, available, config)}")
    placement = replace(placement, attention=choose_attention(config, shape, seq_len, device))
    torch.manual_seed(request.seed)
    causal_lm = load_causal_lm(
        request.model_path, revision=request.revision, trust_remote_code=request.trust_remote_code
    )
    causal_lm.set_attn_implementation(IMPLEMENTATIONS[placement.attention])
    applied = apply_plan(causal_lm, request.plan)
    causal_lm.train()
    placed = place_model(causal_lm, request.plan, config, placement, world_size=world_size, device=device)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters, compiled=config.compile)
    placed.masters.clear()
    if rank == 0:
        print(render_placement(placement, estimate, available, applied), flush=True)
    return BuiltModel(placed, applied, optimizer, placement, estimate, available)


def check_dtype(name: str, device: torch.device) -> None:
    """Refuses a compute dtype the device lacks.

    Raises:
        TrainingError: Naming the device and what to use instead.
    """
    if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise TrainingError(
            f"train.compute_dtype=bfloat16: {torch.cuda.get_device_name(device)} has no bfloat16; use float32"
        )


def find_available_bytes(device: torch.device, local_world_size: int) -> float:
    """Free memory one worker may use: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available) / max(1, local_world_size)


def agree_on_memory(available: float, device: torch.device) -> float:
    """The smallest over the workers, so that all choose the same placement."""
    value = torch.tensor([available], dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return float(value[0])


def count_ray_nodes(world_size: int) -> int:
    """Ray nodes the workers are on; Ray Train's node rank goes by IP address and takes two nodes of one host for one."""
    nodes: list[str | None] = [None] * world_size
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return len(set(nodes))


def render_placement(placement: Placement, estimate: MemoryEstimate, available: float, applied: AppliedPlan) -> str:
    """What was decided at start, in one line."""
    return (
        f"[train] {len(applied.trainable)} parameters train, {len(applied.frozen)} are frozen;"
        f" parallelism {placement.parallelism}"
        + (f", frozen layers {placement.frozen_sharding}d" if placement.parallelism == "shard" else "")
        + f", attention {placement.attention}, {len(placement.checkpointed_layers)} layers recomputed;"
        f" memory predicted {estimate.total / GIB:.2f} GiB of {available / GIB:.2f} GiB per worker"
    )
