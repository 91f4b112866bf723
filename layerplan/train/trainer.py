"""A plan trained on Ray: the request, the worker function, and the result.

Ray Train keeps the run under `<run_dir>/checkpoints`; a checkpoint exists once Ray has committed it, so the newest
complete one is Ray's answer and never the newest folder. Calling `run_training` again on the same folder continues.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from layerplan.checkpoint.layout import CHECKPOINTS_NAME, STATE_NAME, name_step, read_train_state, write_train_state
from layerplan.config.train import TrainConfig
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.stream import make_schedule
from layerplan.errors import TrainingError
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.train.metrics import MetricSink
from layerplan.train.state import TrainState

STOP_REQUEST = "stop_requested"


@dataclass(frozen=True)
class TrainRequest:
    """Everything a training run needs; travels to the workers."""

    run_dir: Path
    model_path: str
    plan: FreezePlan
    store: Path
    config: TrainConfig
    seed: int
    sink_factory: Callable[[int], MetricSink] | None = None
    """(start step) to the sink of rank 0."""
    revision: str = "main"
    trust_remote_code: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the workers."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training run came to."""

    final_step: int
    final_checkpoint: Path
    first_loss: float
    final_loss: float
    validation_loss: float | None
    tokens_seen: int
    train_s: float
    tokens_per_s: float
    skipped_steps: int
    stopped_early: bool


def run_training(request: TrainRequest, *, callbacks: Sequence[Any] = ()) -> TrainResult:
    """Trains the plan, or continues, or returns the result of a run that is already finished.

    Args:
        request: What to train.
        callbacks: Ray Train `UserCallback`s for the controller.

    Raises:
        TrainingError: When training fails; the message carries the worker's own.
        CorpusError: When the store cannot feed the batch.
    """
    finished = load_result(request.run_dir)
    if finished is not None and finished.final_step >= request.config.max_steps:
        return finished
    make_schedule(request.store, num_lanes=request.config.global_batch_size, seed=request.seed)
    _check_training_fits(request)
    stop_file = request.run_dir / STOP_REQUEST
    request.run_dir.mkdir(parents=True, exist_ok=True)
    stop_file.unlink(missing_ok=True)
    with _stop_on_sigterm(stop_file):
        result = _fit(request, callbacks)
    checkpoint = Path(result.checkpoint.path)
    state = TrainState.model_validate(read_train_state(checkpoint))
    summary = _summarise(state, checkpoint, request.config)
    if not summary.stopped_early:
        _save_result(request.run_dir, summary)
    return summary


def load_result(run_dir: Path) -> TrainResult | None:
    """Reads `training.json` of a finished run, or returns None."""
    path = run_dir / "training.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return TrainResult(**{**values, "final_checkpoint": run_dir / values["final_checkpoint"]})


def _fit(request: TrainRequest, callbacks: Sequence[Any]) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    config = request.config
    backend = "cpu:gloo,cuda:nccl" if config.use_gpu else "gloo"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"request": request},
        torch_config=TorchConfig(backend=backend),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.num_cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS_NAME,
            storage_path=str(request.run_dir),
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": dict(request.env)} if request.env else {},
        ),
    )
    result = trainer.fit()
    if result.error is not None:
        raise TrainingError(f"training failed: {result.error}") from result.error
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint")
    return result


def train_worker(loop_config: dict[str, Any]) -> None:
    """What every worker runs: build, restore, loop."""
    import ray.train
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from layerplan.checkpoint.dcp import load_checkpoint
    from layerplan.corpus.store import load_validation_rows
    from layerplan.corpus.stream import iter_rank_steps
    from layerplan.models.causal_lm import load_causal_lm
    from layerplan.models.freezing import apply_plan
    from layerplan.train.loop import LoopHooks, LoopSetup, run_loop
    from layerplan.train.optim import build_optimizer
    from layerplan.train.sharding import cast_for_training, shard_model

    request: TrainRequest = loop_config["request"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.manual_seed(request.seed)
    causal_lm = load_causal_lm(request.model_path, revision=request.revision, trust_remote_code=request.trust_remote_code)
    applied = apply_plan(causal_lm, request.plan)
    cast_for_training(causal_lm, request.config)
    causal_lm.to(device).train()
    mesh = init_device_mesh(device.type, (world_size,))
    model = shard_model(causal_lm, request.plan, request.config, mesh)
    optimizer = build_optimizer(model, request.config.optimizer)
    manifest = Manifest.load(request.store)
    state = TrainState(plan_sha256=request.plan.sha256, corpus_sha256=manifest.content_sha256)
    restored = ray.train.get_checkpoint()
    if restored is not None:
        state = state.check_same_run(read_train_state(Path(restored.path)))
        load_checkpoint(Path(restored.path), model, optimizer)
    sink = request.sink_factory(state.step) if rank == 0 and request.sink_factory is not None else None
    setup = LoopSetup(
        model, optimizer, applied, request.config, device, rank, world_size, seq_len=manifest.seq_len
    )
    hooks = LoopHooks(
        iter_steps=lambda start, stop: iter_rank_steps(
            request.store,
            num_lanes=request.config.global_batch_size,
            seed=request.seed,
            rank=rank,
            world_size=world_size,
            start_step=start,
            stop_step=stop,
        ),
        save=partial(_save_and_report, request, model, optimizer, dist.new_group(backend="gloo"), rank),
        should_stop=(request.run_dir / STOP_REQUEST).exists,
        sink=sink,
        validation=load_validation_rows(request.store),
    )
    try:
        run_loop(setup, state, hooks)
    finally:
        if sink is not None:
            sink.close()


def _save_and_report(
    request: TrainRequest, model: Any, optimizer: Any, group: Any, rank: int, state: TrainState
) -> None:
    """Saves in the background and commits through Ray: complete, or ignored."""
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode

    from layerplan.checkpoint.dcp import save_checkpoint

    name = name_step(state.step)
    folder = request.run_dir / CHECKPOINTS_NAME / name
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE_NAME).unlink(missing_ok=True)
    future = save_checkpoint(folder, model, optimizer, group)

    def finish(checkpoint: Checkpoint, checkpoint_dir_name: str) -> Checkpoint:
        if future is not None:
            future.result()
        if rank == 0:
            write_train_state(folder, state.model_dump(mode="json"))
        return Checkpoint(str(folder))

    ray.train.report(
        {"step": state.step, "train_loss": state.last_loss, "validation_loss": state.validation_loss},
        checkpoint=Checkpoint(str(folder)),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=finish,
        delete_local_checkpoint_after_upload=False,
    )


def _check_training_fits(request: TrainRequest) -> None:
    from layerplan.models.causal_lm import load_hf_config
    from layerplan.plan.model_shape import ModelShape

    manifest = Manifest.load(request.store)
    shape = ModelShape.from_hf_config(load_hf_config(request.model_path, revision=request.revision))
    if manifest.seq_len > shape.max_position_embeddings:
        raise TrainingError(
            f"corpus.seq_len={manifest.seq_len}: the model has {shape.max_position_embeddings} positions"
        )
    if manifest.vocab_size > shape.vocab_size:
        raise TrainingError(
            f"tokenizer: has {manifest.vocab_size} entries, the model's embedding only {shape.vocab_size};"
            " the tokenizer does not fit the model"
        )


def _summarise(state: TrainState, checkpoint: Path, config: TrainConfig) -> TrainResult:
    return TrainResult(
        final_step=state.step,
        final_checkpoint=checkpoint,
        first_loss=state.first_loss if state.first_loss is not None else float("nan"),
        final_loss=state.last_loss if state.last_loss is not None else float("nan"),
        validation_loss=state.validation_loss,
        tokens_seen=state.tokens_seen,
        train_s=state.train_s,
        tokens_per_s=state.tokens_seen / max(state.train_s, 1e-9),
        skipped_steps=state.skipped_steps,
        stopped_early=state.step < config.max_steps,
    )


def _save_result(run_dir: Path, result: TrainResult) -> None:
    values = asdict(result) | {"final_checkpoint": os.path.relpath(result.final_checkpoint, run_dir)}
    partial_path = run_dir / "training.json.partial"
    partial_path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial_path.replace(run_dir / "training.json")


@contextmanager
def _stop_on_sigterm(stop_file: Path) -> Iterator[None]:
    """SIGTERM asks the workers for a last checkpoint instead of killing the driver."""

    def request_stop(signum: int, frame: Any) -> None:
        print("[train] SIGTERM: saving a checkpoint, then stopping", flush=True)
        stop_file.touch()

    try:
        previous = signal.signal(signal.SIGTERM, request_stop)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        stop_file.unlink(missing_ok=True)
