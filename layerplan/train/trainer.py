"""A plan trained on Ray: checks before launch, the Ray Train run, and the result.

Ray Train keeps the run under `<run_dir>/checkpoints`; a checkpoint exists once it is sealed, and the workers go on from the
newest one that proves itself. Calling `run_training` again on the same folder continues.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerplan.checkpoint.export_report import is_exported_as
from layerplan.checkpoint.index import list_checkpoints, prune_checkpoints
from layerplan.checkpoint.layout import read_train_state
from layerplan.corpus.manifest import Manifest
from layerplan.errors import LayerplanError, TrainingError, find_layerplan_error
from layerplan.run_folder import (
    ADAPTERS_NAME,
    AWAITS_NAME,
    CHECKPOINTS_NAME,
    EXPORT_NAME,
    EXPORTS_NAME,
    STOP_REQUEST,
    name_step,
)
from layerplan.storage.flag import Flag
from layerplan.storage.paths import StoredPath
from layerplan.storage.working import find_home
from layerplan.train.feed import check_feed
from layerplan.train.known_rows import find_rows
from layerplan.train.ray_trainer import deciding_anew, make_torch_trainer
from layerplan.train.request import TrainRequest, TrainResult, load_result
from layerplan.train.resume import check_resumable, reset_ray_index
from layerplan.train.state import TrainState
from layerplan.train.token_flops import predict_token_flops

logger = logging.getLogger(__name__)

_STOPPING: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C (once more ends at once)"}

Fit = Callable[[TrainRequest, StoredPath], None]

__all__ = ["TrainRequest", "TrainResult", "export_result", "load_result", "run_training"]


def run_training(
    request: TrainRequest, *, callbacks: Sequence[Any] = (), fit: Fit | None = None, exports: bool = True
) -> TrainResult:
    """Trains the plan, or continues, or returns the result of a run that is already finished.

    A finished run whose `max_steps` was raised continues from its last checkpoint (`layerplan/train/horizon.py`), and one whose
    `export_dtype` changed is exported anew from it.

    SIGTERM and Ctrl-C make the workers save a checkpoint and stop; the signal is then delivered again to whoever handled
    it before, so that a job exits as it would have. A second Ctrl-C does not wait for the checkpoint.

    Args:
        request: What to train.
        callbacks: Ray Train `UserCallback`s for the controller.
        fit: Trains into a folder of checkpoints with workers that are there; left out, a Ray Train run is started.
        exports: Whether the result is written as a model folder; `export_result` does so later.

    Raises:
        TrainingError: When training cannot start or fails; the message carries the worker's own.
        CorpusError: When the store cannot feed the batch.
        PlanError: When the plan was made for another model.
    """
    started = time.perf_counter()
    finished = load_result(request.run_dir)
    if finished is not None and finished.final_step >= request.config.max_steps:
        return _refresh_export(request, finished) if exports else finished
    check_feed(request.store, num_lanes=request.config.global_batch_size, seed=request.seed)
    check_training_fits(request)
    request.run_dir.mkdir(parents=True, exist_ok=True)
    with stopping_on_signals(request.run_dir):
        checkpoint = _fit(request, callbacks, fit)
    state = TrainState.parse(read_train_state(checkpoint))
    hf_dir = None
    if exports and state.step >= request.config.max_steps:
        hf_dir = _export(request, checkpoint, state.step)
    result = _summarise(request, state, checkpoint, hf_dir, wall_s=time.perf_counter() - started)
    if not result.stopped_early:
        result.save(request.run_dir)
    return result


def export_result(request: TrainRequest) -> TrainResult:
    """Writes a finished training as a model folder, where it is not written yet, and returns its result.

    Raises:
        TrainingError: When the training is not finished.
        CheckpointError: When its checkpoint is gone or damaged.
    """
    result = load_result(request.run_dir)
    if result is None or result.stopped_early:
        raise TrainingError(f"{request.run_dir}: its training is not finished, there is nothing to export")
    if result.hf_dir is not None and result.hf_dir.exists():
        return _refresh_export(request, result)
    return _export_anew(request, result)


def _refresh_export(request: TrainRequest, result: TrainResult) -> TrainResult:
    """The result with an export in the dtype that the config asks for now, written again where it has another."""
    asked = request.config.export_dtype
    if result.hf_dir is None or is_exported_as(request.run_dir / EXPORT_NAME, asked):
        return result
    logger.info("train.export_dtype is %s now: exporting %s anew", asked, name_step(result.final_step))
    return _export_anew(request, result)


def _export_anew(request: TrainRequest, result: TrainResult) -> TrainResult:
    checkpoint = find_home(request.run_dir.resolve() / CHECKPOINTS_NAME) / name_step(result.final_step)
    exported = replace(result, hf_dir=_export(request, checkpoint, result.final_step))
    exported.save(request.run_dir)
    return exported


def check_training_fits(request: TrainRequest) -> None:
    """Refuses, before anything is launched, what cannot be trained.

    Raises:
        TrainingError: A tokenizer larger than the model's embedding.
        PlanError: A plan for another model, or rows longer than the model's positions.
    """
    request.plan.check_model(request.model.identity())
    manifest = Manifest.load(request.store)
    shape = request.model.shape()
    shape.check_seq_len(manifest.seq_len)
    if manifest.vocab_size > shape.vocab_size:
        raise TrainingError(
            f"corpus: its documents may hold token {manifest.vocab_size - 1} of their tokenizer, the model's embedding has"
            f" {shape.vocab_size} rows; the tokenizer does not fit the model"
        )
    if manifest.max_id is not None and manifest.max_id >= shape.vocab_size:
        raise TrainingError(
            f"{request.store}: holds token {manifest.max_id}, the model's embedding has rows 0 to {shape.vocab_size - 1};"
            " the store was built for another model"
        )


def _fit(request: TrainRequest, callbacks: Sequence[Any], fit: Fit | None) -> StoredPath:
    from layerplan.train.watchdog import watching_stalls

    config = request.config
    checkpoints = find_home(request.run_dir.resolve() / CHECKPOINTS_NAME)
    corpus_sha256 = Manifest.load(request.store).content_sha256
    check_resumable(checkpoints, TrainState(plan_sha256=request.plan.sha256, corpus_sha256=corpus_sha256))
    reset_ray_index(checkpoints)
    if fit is not None:
        fit(request, checkpoints)
    else:
        with watching_stalls(request.run_dir, config.stall_timeout) as board:
            _run_ray_train(replace(request, board=board), checkpoints, callbacks)
    prune_checkpoints(checkpoints, config.keep_checkpoints)
    finished = list_checkpoints(checkpoints)
    if not finished:
        raise TrainingError("training ended without a checkpoint")
    return finished[0]


def _run_ray_train(request: TrainRequest, checkpoints: StoredPath, callbacks: Sequence[Any]) -> None:
    import ray.train

    trainer = make_torch_trainer(
        _train_worker,
        {"request": request},
        request.config,
        name=CHECKPOINTS_NAME,
        folder=checkpoints.parent,
        max_failures=request.config.max_failures,
        env=request.env,
        callbacks=callbacks,
        validation_config=None
        if request.validation is None
        else ray.train.ValidationConfig(
            fn=_ReleasingValidation(request.validation.fn, checkpoints), ray_remote_kwargs={"num_cpus": 0}
        ),
    )
    try:
        with deciding_anew(request.config):
            result = trainer.fit()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise _explain_failure(error, request) from error
    if result.error is not None:
        raise _explain_failure(result.error, request) from result.error


@dataclass(frozen=True)
class _ReleasingValidation:
    """Validates a checkpoint, which may be removed from then on; one whose validation was interrupted stays."""

    fn: Callable[[Any], dict[str, Any]]
    checkpoints: StoredPath

    def __call__(self, checkpoint: Any) -> dict[str, Any]:
        values = self.fn(checkpoint)
        (self.checkpoints / Path(checkpoint.path).name / AWAITS_NAME).unlink(missing_ok=True)
        return values


def _train_worker(loop_config: dict[str, Any]) -> None:
    """The train function. Driver and controller load it too, and need none of the model code it imports."""
    from layerplan.train.worker import run_worker

    run_worker(loop_config["request"])


def _explain_failure(error: BaseException, request: TrainRequest) -> LayerplanError:
    """The first fault of ours in the failures of the workers, a loss, or the engine's own last line."""
    from layerplan.train.lost import describe_next, explain_loss

    fault = find_layerplan_error(error)
    if fault is not None:
        return type(fault)(*fault.args)
    loss = explain_loss(error, request.run_dir, request.config.max_failures)
    if loss is not None:
        return loss
    failures = getattr(error, "worker_failures", None) or {}
    texts = [str(failure) for failure in failures.values()] or [str(error)]
    lines = [line.strip() for line in texts[0].splitlines() if line.strip()]
    reason = lines[-1] if lines else type(error).__name__
    return TrainingError(f"training failed: {reason}; {describe_next(request.run_dir)}")


def _export(request: TrainRequest, checkpoint: StoredPath, step: int) -> Path:
    from layerplan.checkpoint.hf_export import export_hf

    folder = request.run_dir / EXPORTS_NAME / name_step(step)
    options = (
        {} if request.labels is None or request.labels.lora is None else _export_adapter(request, checkpoint, step)
    )
    report = export_hf(
        base=request.model,
        checkpoint=checkpoint,
        out_dir=folder,
        plan=request.plan,
        export_dtype=request.config.export_dtype,
        **options,
    )
    report.save(request.run_dir / EXPORT_NAME)
    logger.info(
        "exported %s: %d frozen tensors have the base's dtype and bytes, %d of %d trained ones changed (written in %s)",
        folder,
        report.num_frozen,
        report.num_trained_changed,
        report.num_trained,
        " and ".join(report.trained_dtypes),
    )
    return folder


def _export_adapter(request: TrainRequest, checkpoint: StoredPath, step: int) -> dict[str, Any]:
    """Writes the adapter in PEFT's own format; the export beside it is the base with it merged in."""
    from layerplan.checkpoint.adapter_export import export_adapter

    assert request.labels is not None and request.labels.lora is not None
    folder = request.run_dir / ADAPTERS_NAME / name_step(step)
    read = export_adapter(request.model, checkpoint, folder, request.plan, request.labels.lora)
    logger.info("adapter in PEFT's format: %s", folder)
    return {"read_trained": read}


def _summarise(
    request: TrainRequest, state: TrainState, checkpoint: StoredPath, hf_dir: Path | None, *, wall_s: float
) -> TrainResult:
    import math

    return TrainResult(
        final_step=state.step,
        final_checkpoint=request.run_dir.resolve() / CHECKPOINTS_NAME / checkpoint.name,
        first_loss=state.first_loss if state.first_loss is not None else math.nan,
        final_loss=state.last_loss if state.last_loss is not None else math.nan,
        validation_loss=state.validation_loss,
        tokens_seen=state.tokens_seen,
        train_s=state.train_s,
        wall_s=wall_s,
        tokens_per_s=state.tokens_seen / max(state.train_s, 1e-9),
        mfu=_overall_mfu(request, state),
        skipped_steps=state.skipped_steps + state.skipped_spikes,
        rollbacks=state.rollbacks,
        proof=state.summarise_proof(),
        stopped_early=state.step < request.config.max_steps,
        hf_dir=hf_dir,
        base_validation_loss=state.base_validation_loss,
        propagated_rows=state.propagated_rows,
        worlds=state.worlds,
        mean_workers=state.mean_workers or request.config.most_workers,
        micro_batch_size=find_rows(request),
    )


def _overall_mfu(request: TrainRequest, state: TrainState) -> float:
    from layerplan.train.throughput import compute_mfu

    if not state.peak_flops:
        return 0.0
    flops = predict_token_flops(request.plan, request.model.shape(), Manifest.load(request.store), request.labels)
    return compute_mfu(
        state.tokens_seen / max(state.train_s, 1e-9),
        flops,
        peak_flops=state.peak_flops,
        num_workers=state.mean_workers or request.config.most_workers,
    )


@contextmanager
def stopping_on_signals(run_dir: Path) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask the workers for a last checkpoint instead of ending the driver; afterwards they are raised again.

    Ctrl-C once more raises `KeyboardInterrupt` at once. Where it is ignored, as by a shell that starts a job in the
    background, it stays so.
    """
    stop_file = Flag(run_dir / STOP_REQUEST)
    stop_file.unlink()
    asked: list[int] = []

    def request_stop(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signum in asked:
            raise KeyboardInterrupt
        asked.append(signum)
        logger.info("%s: saving a checkpoint, then stopping", _STOPPING[signum])
        stop_file.touch()

    if threading.current_thread() is not threading.main_thread():  # whoever owns it decides
        yield
        return
    heard = [signum for signum in _STOPPING if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, request_stop) for signum in heard}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        stop_file.unlink()
        if asked:
            os.kill(os.getpid(), asked[0])
