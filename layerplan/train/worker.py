"""What every training worker runs under Ray Train: build, restore, loop, save; once per phase of the plan."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import ray
import ray.train
import torch
import torch.distributed as dist

from layerplan.corpus.manifest import Manifest
from layerplan.corpus.rows import PackedRows
from layerplan.corpus.store import load_validation_rows
from layerplan.errors import StorageError
from layerplan.log import set_rank, set_up_worker
from layerplan.plan.cost import GIB
from layerplan.plan.explain import explain_changes
from layerplan.plan.freeze_plan import FreezePlan, PlanPhase
from layerplan.plan.memory import explain_shortage
from layerplan.ray_session import quiet_engines
from layerplan.run_folder import CHECKPOINTS_NAME, LEDGER_NAME, RESULT_NAME, STOP_REQUEST, RunFolder
from layerplan.storage.flag import Flag
from layerplan.storage.mirror import carry_file, fetch_file
from layerplan.storage.working import find_home
from layerplan.train.build import BuiltModel, build_model
from layerplan.train.checkpoint_writer import CheckpointWriter
from layerplan.train.feed import count_embeddings, open_feed
from layerplan.train.frozen_check import FrozenTensors
from layerplan.train.heartbeat import beating
from layerplan.train.horizon import extend_horizon
from layerplan.train.judge import HeldOutJudge, read_texts
from layerplan.train.ledger import LedgerWriter
from layerplan.train.loop import run_loop
from layerplan.train.loop_setup import LoopHooks, LoopSetup
from layerplan.train.loss_proof import prove_loss
from layerplan.train.metrics import MetricSink
from layerplan.train.micro_batch import build_to_fit, noting_shortage
from layerplan.train.node_load import NodeLoad
from layerplan.train.outlet import ALONE, Outlet
from layerplan.train.place import STARTING, Mark
from layerplan.train.prefix_cache import open_prefix_cache
from layerplan.train.prometheus import RayGauges
from layerplan.train.request import Judging, TrainRequest, load_result
from layerplan.train.resume import find_resume
from layerplan.train.sharding import reset_compiled
from layerplan.train.state import TrainState
from layerplan.train.throughput import find_peak_flops
from layerplan.train.token_flops import predict_token_flops
from layerplan.train.world import note_world

logger = logging.getLogger(__name__)

REACHED = 0.5
"""Share of its peak rate that a worker is taken to reach, where time is predicted."""


def run_worker(request: TrainRequest, outlet: Outlet = ALONE) -> None:
    """One worker's part of a training run, inside Ray Train's train function."""
    set_up_worker()
    quiet_engines()
    request.model.fetch()
    fetch_file(request.run_dir / RESULT_NAME)
    context = ray.train.get_context()
    set_rank(context.get_world_rank())
    with beating(request.board, context.get_world_rank()) as mark:
        train_phases(request, mark, outlet)


def train_phases(request: TrainRequest, mark: Mark, outlet: Outlet) -> None:
    """Trains phase after phase of the plan, saying through `mark` where it is."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    manifest = Manifest.load(request.store)
    shape = request.model.shape()
    nodes = list_ray_nodes(world_size)
    logger.info("workers: %d on %d Ray node%s", world_size, len(set(nodes)), "s" if len(set(nodes)) > 1 else "")
    fresh = TrainState(plan_sha256=request.plan.sha256, corpus_sha256=manifest.content_sha256)
    checkpoints = find_home(request.run_dir / CHECKPOINTS_NAME)
    resumed = find_resume(checkpoints, fresh, rank)
    state = resumed.state
    group, host_group = make_host_groups()
    load = NodeLoad()
    place = {"seq_len": manifest.seq_len, "rank": rank, "world_size": world_size}
    with open_recorders(request, state, rank, world_size, host_group) as recorders:
        while True:
            mark(STARTING, state.step)
            plan = request.plan.at_step(state.step)
            end = request.plan.next_change(state.step) or request.config.max_steps
            built = build_to_fit(
                partial(
                    build_model,
                    request,
                    plan,
                    shape,
                    device,
                    local_world_size=context.get_local_world_size(),
                    checkpoint=resumed.checkpoint,
                    **place,
                ),
                request,
                forget=partial(forget_phase, device),
                **place,
            )
            writer = CheckpointWriter(
                checkpoints,
                built.placed.model,
                built.optimizer,
                group,
                rank,
                resumed=resumed,
                keep=request.config.keep_checkpoints,
                parked=built.parked,
                fresh_moments=bool(request.plan.phases),
                validated_steps=range(0) if request.validation is None else request.validation.steps,
                before_seal=partial(carry_records, request, is_sealing=True),
                publish=outlet.publish,
            )
            state = recorders.note_start(request, writer.restore() or state)
            request = replace(request, recipe=built.recipe)
            state = prove_loss(
                built.placed.model,
                state,
                seq_len=manifest.seq_len,
                dtype=getattr(torch, request.config.compute_dtype),
                world_size=world_size,
            )
            frozen, state = prove_frozen(request, built, state, world_size)
            peak_flops = find_peak_flops(request.config, device)
            prefix = open_prefix_cache(request, built, shape, flops_per_s=REACHED * peak_flops, world_size=world_size)
            setup = LoopSetup(
                built.placed,
                built.optimizer,
                built.applied,
                built.config,
                device,
                rank,
                world_size,
                seed=request.seed,
                flops_per_token=predict_token_flops(plan, shape, manifest, request.labels),
                peak_flops=peak_flops,
                predicted_memory_gib=built.estimate.total / GIB,
                memory_advice=explain_shortage(built.estimate, built.available_bytes, built.config),
                profile_dir=RunFolder(request.run_dir).step_times if rank == 0 else None,
                rewarm=find_rewarm(request.plan, state.step),
                frozen=frozen,
                prefix=prefix,
                host_group=host_group,
                node=nodes[rank],
                read_load=load.read,
            )
            hooks = make_hooks(request, setup, state, writer, recorders, mark, outlet)
            with noting_shortage(built, request):
                state = run_loop(setup, state, hooks, stop_step=end)
            if prefix is not None:
                prefix.close(is_done=state.step >= request.config.max_steps)
            if state.step < end or state.step >= request.config.max_steps or is_asked_to_stop(request, rank):
                return
            resumed = writer.finish()
            recorders.note_change(request.plan, state.step)
            built.placed.release()
            del built, setup, writer, frozen, prefix, hooks
            forget_phase(device)


def prove_frozen(
    request: TrainRequest, built: BuiltModel, state: TrainState, world_size: int
) -> tuple[FrozenTensors | None, TrainState]:
    """Takes the checksums of what is frozen from here on, and compares them with those of the attempt before."""
    if not request.config.check_frozen:
        return None, state
    started = time.perf_counter()
    dtype = "float8" if request.config.frozen_fp8 else request.config.compute_dtype
    frozen = FrozenTensors(built.placed.model, dtype, world_size)
    if state.step > find_phase_start(request.plan, state.step):
        frozen.check_same_as(state.frozen_checksum)
        state = state.count_frozen_check(time.perf_counter() - started)
    return frozen, state.model_copy(update={"frozen_checksum": frozen.digest})


def is_asked_to_stop(request: TrainRequest, rank: int) -> bool:
    """Whether a stop was asked for in the last step of a phase; rank 0 knows, all get its answer.

    Not through the group of the checkpoints, which a save in the background is using.
    """
    asked = torch.tensor([int(rank == 0 and Flag(request.run_dir / STOP_REQUEST).exists())])
    dist.broadcast(asked, src=0)
    return bool(asked.item())


def find_phase_start(plan: FreezePlan, step: int) -> int:
    """First step of the phase `step` is in; 0 for a plan that does not change."""
    return max((phase.start_step for phase in plan.phases if phase.start_step <= step), default=0)


def find_rewarm(plan: FreezePlan, step: int) -> tuple[int, int]:
    """(first step of the phase, steps over which the rate rises); no steps in the first phase."""
    start = find_phase_start(plan, step)
    return start, plan.rewarm_steps if start > 0 else 0


def forget_phase(device: torch.device) -> None:
    """Frees the model of a phase that is over, and the graphs compiled for it."""
    gc.collect()
    reset_compiled()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class Recorders:
    """What outlives the phases of a plan: the sink of rank 0, and the ledger."""

    sink: MetricSink | None
    ledger: LedgerWriter | None
    world_size: int

    def note_start(self, request: TrainRequest, state: TrainState) -> TrainState:
        """Records that from here on the schedule is one of more steps, or there are other workers, when it is so."""
        finished = load_result(request.run_dir)
        state, line = extend_horizon(state, request.config, None if finished is None else finished.final_step)
        self._tell("schedule_horizon", state.step, line)
        state, line = note_world(state, self.world_size)
        self._tell("world_change", state.step, line)
        return state

    def _tell(self, event: str, step: int, line: str) -> None:
        if not line:
            return
        logger.info(line)
        if self.sink is not None:
            self.sink.log_event(event, step, line)

    def note_change(self, plan: FreezePlan, step: int) -> None:
        """Records that another phase begins."""
        if self.sink is None:
            return
        message = explain_changes(plan.model_copy(update={"phases": (_phase_at(plan, step),)}))[0]
        self.sink.log_event("plan_change", step, message)
        logger.info("plan changes at %s", message)


def _phase_at(plan: FreezePlan, step: int) -> PlanPhase:
    return [phase for phase in plan.phases if phase.start_step <= step][-1]


@contextmanager
def open_recorders(
    request: TrainRequest, state: TrainState, rank: int, world_size: int, host_group: dist.ProcessGroup
) -> Iterator[Recorders]:
    """Opens the sink of rank 0 and the ledger, goes on with what they hold, and closes the sink."""
    if rank == 0:
        for path in list_records(request):
            fetch_file(path)
    sink: MetricSink | None = None
    if rank == 0 and request.sink_factory is not None:
        sink = RayGauges(request.sink_factory(state.step), request.run_dir.name)
    ledger = None
    if request.config.write_ledger:
        place = {"rank": rank, "world_size": world_size, "group": host_group}
        ledger = LedgerWriter(request.run_dir / LEDGER_NAME, start_step=state.step, **place)
    try:
        yield Recorders(sink, ledger, world_size)
    finally:
        if sink is not None:
            sink.close()
        if rank == 0:
            carry_records(request)


def list_records(request: TrainRequest) -> tuple[Path, ...]:
    """Files that rank 0 appends to."""
    return (request.run_dir / LEDGER_NAME, *request.records)


def carry_records(request: TrainRequest, *, is_sealing: bool = False) -> None:
    """Brings them to where the run is stored; a checkpoint counts only when they are there up to its step.

    Raises:
        StorageError: When a checkpoint is to be sealed without one of them: its working folder was removed.
    """
    for path in list_records(request):
        home = find_home(path)
        is_kept = path.name == LEDGER_NAME and request.config.write_ledger
        if is_sealing and home != path and not path.exists() and (is_kept or home.exists()):
            raise StorageError(f"{path}: was removed while the run went on; no checkpoint is sealed without it")
        carry_file(path)


def make_hooks(
    request: TrainRequest,
    setup: LoopSetup,
    state: TrainState,
    writer: CheckpointWriter,
    recorders: Recorders,
    mark: Mark,
    outlet: Outlet,
) -> LoopHooks:
    """Connects the loop with the store, the checkpoints and the recorders."""
    ledger = recorders.ledger

    def restore() -> TrainState | None:
        restored = writer.restore()
        if restored is not None and ledger is not None and setup.rank == 0:
            ledger.drop_after(restored.step)
        if restored is not None and recorders.sink is not None:
            recorders.sink.drop_after(restored.step)
        return None if restored is None else recorders.note_start(request, restored)

    count_rows = setup.placed.model.start_counting(state, setup.world_size)
    feed = open_feed(request, state, rank=setup.rank, world_size=setup.world_size)
    validation = load_validation_rows(request.store, num_ids=count_embeddings(request))
    return LoopHooks(
        iter_steps=feed.iter_steps,
        save=lambda reached: writer.save(count_rows(feed.stamp(reached))),
        should_stop=Flag(request.run_dir / STOP_REQUEST).exists,
        sink=recorders.sink,
        validation=validation,
        restore=restore,
        write_ledger=None if ledger is None else lambda step, rows: ledger.write(step, rows.row_ids[rows.row_ids >= 0]),
        mark=mark,
        measure=None if request.judging is None else make_judge(request, request.judging, setup, validation, outlet),
    )


def make_judge(
    request: TrainRequest, judging: Judging, setup: LoopSetup, validation: PackedRows | None, outlet: Outlet
) -> HeldOutJudge:
    """What measures the model on held-out rows, one by one."""
    return HeldOutJudge(
        setup.placed.model,
        read_texts(judging, validation),
        judging,
        request.config.max_steps,
        setup.device,
        setup.rank,
        setup.world_size,
        outlet.tell,
    )


@lru_cache(maxsize=1)
def make_host_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of all ranks for checkpoints and for what hosts tell each other; made once in a process, whatever it trains."""
    return dist.new_group(backend="gloo"), dist.new_group(backend="gloo")


def list_ray_nodes(world_size: int) -> list[int]:
    """The Ray node of every rank, as numbers in the order of ranks; Ray Train's own goes by IP address and takes two nodes of
    one host for one.
    """
    if world_size == 1:
        return [0]
    ids: list[str | None] = [None] * world_size
    dist.all_gather_object(ids, ray.get_runtime_context().get_node_id())
    order = list(dict.fromkeys(ids))
    return [order.index(each) for each in ids]
