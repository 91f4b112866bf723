"""Where a training goes on: rank 0 lists the checkpoints, all ranks read their part of them, all come to one answer.

What Ray keeps of its own on the checkpoints of a run is not asked: it lags behind what the workers have finished, and a
run must not end because that file is gone or cut. Before Ray reads it, it is written anew from the folders.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from layerplan.checkpoint.index import (
    Candidate,
    choose_checkpoint,
    find_run_id,
    inspect_checkpoints,
    list_checkpoints,
    prove_candidate,
    set_aside,
)
from layerplan.checkpoint.seal import check_files
from layerplan.errors import CheckpointError
from layerplan.run_folder import AWAITS_NAME, parse_step
from layerplan.storage.paths import StoredPath, write_whole
from layerplan.train.state import TrainState

logger = logging.getLogger(__name__)

RAY_INDEX_NAME = "checkpoint_manager_snapshot.json"


@dataclass(frozen=True)
class Resumed:
    """A proven checkpoint, or none, and the state to go on from."""

    checkpoint: StoredPath | None
    state: TrainState
    run_id: str


def find_resume(folder: StoredPath, expected: TrainState, rank: int) -> Resumed:
    """Finds the newest checkpoint that proves itself; a collective, with the same answer on every rank.

    Args:
        folder: `checkpoints` of the run.
        expected: State of a run that begins; a checkpoint must be of its plan and corpus.
        rank: Of this worker.

    Raises:
        CheckpointError: When there are checkpoints and none can be used.
    """
    found: tuple[str, list[Candidate]] = ("", [])
    if rank == 0:
        run_id = find_run_id(folder)
        found = run_id, inspect_checkpoints(folder, expected.check_same_run, run_id)
    run_id, candidates = _broadcast(found)
    choice = choose_checkpoint(candidates, lambda candidate: _prove_together(candidate, rank))
    if rank == 0:
        set_aside(choice)
        if line := choice.describe():
            logger.info(line)
    if choice.used is None:
        return Resumed(None, expected, run_id)
    return Resumed(choice.used.path, expected.check_same_run(choice.used.state), run_id)


def check_resumable(folder: StoredPath, expected: TrainState) -> None:
    """Refuses, before workers are started, a folder whose checkpoints are all of another run or unreadable.

    Raises:
        CheckpointError: Naming each of them.
    """
    candidates = inspect_checkpoints(folder, expected.check_same_run, find_run_id(folder))
    choose_checkpoint(candidates, prove=lambda candidate: "")


def reset_ray_index(folder: StoredPath) -> None:
    """Leaves Ray only what it must take up again: the checkpoints whose validation was interrupted."""
    waiting = [path for path in reversed(list_checkpoints(folder)) if (path / AWAITS_NAME).exists()]
    index = folder / RAY_INDEX_NAME
    if not waiting:
        index.unlink(missing_ok=True)
        return
    results = [
        {"version": 0, "checkpoint_dir_name": path.name, "metrics": {"step": parse_step(path.name)}} for path in waiting
    ]
    write_whole(index, json.dumps(_render_ray_index(results)).encode())


def _render_ray_index(results: list[dict[str, Any]]) -> dict[str, Any]:
    import ray

    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": results,
        "pending_validation_specs": [True] * len(results),
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }


def _prove_together(candidate: Candidate, rank: int) -> str:
    """Every rank reads its share of the files; the fault of the lowest rank that found one, or nothing."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return prove_candidate(candidate)
    faults: list[str] = [""] * world_size
    dist.all_gather_object(faults, _prove_share(candidate, rank, world_size))
    return next((fault for fault in faults if fault), "")


def _prove_share(candidate: Candidate, rank: int, world_size: int) -> str:
    seal = candidate.seal
    if seal is None:
        return prove_candidate(candidate) if rank == 0 else ""
    by_size = sorted(seal.files, key=lambda name: (-seal.files[name].size, name))
    try:
        check_files(candidate.path, seal, by_size[rank::world_size])
    except CheckpointError as error:
        return str(error)
    return ""


def _broadcast(value: Any) -> Any:
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]
