"""The checkpoints of a run: its folders and their seals say which there are and which is used.

The newest one that proves itself is used. A newer one that is damaged, mixed or of another run is set aside with its
reason; one without the seal its state promises is unfinished and written again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerplan.checkpoint.layout import METADATA_NAME, promises_seal, read_train_state
from layerplan.checkpoint.seal import Seal, check_files, read_seal
from layerplan.errors import CheckpointError
from layerplan.run_folder import (
    AWAITS_NAME,
    REASON_NAME,
    RUN_ID_NAME,
    SEAL_NAME,
    SET_ASIDE_NAME,
    STATE_NAME,
    STEP_PREFIX,
    parse_step,
)
from layerplan.storage.paths import BucketPath, StoredPath, remove_tree, write_whole


@dataclass(frozen=True)
class Candidate:
    """A checkpoint as far as it is known without reading its shards."""

    path: StoredPath
    step: int
    seal: Seal | None = None
    """None when it is from before there were seals."""
    state: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    """Why it cannot be used."""
    is_finished: bool = True


@dataclass(frozen=True)
class Choice:
    """Which checkpoint is used, and why the newer ones are not."""

    used: Candidate | None
    passed_over: tuple[Candidate, ...] = ()
    """Newest first, each with its fault."""

    def describe(self) -> str:
        """One line on what is out of the ordinary; empty when nothing is."""
        if self.used is None:
            steps = ", ".join(each.path.name for each in self.passed_over)
            return f"{steps} was never finished; training begins at step 0" if steps else ""
        reasons = "; ".join(f"{each.path.name} {_describe_passed_over(each)}" for each in self.passed_over)
        doubt = f"{self.used.path.name} has no seal, as checkpoints of older versions: it cannot be proved undamaged"
        parts = [f"{reasons}; going on from {self.used.path.name}"] if reasons else []
        return "; ".join(parts + ([f"warning: {doubt}"] if self.used.seal is None else []))


def list_checkpoints(folder: StoredPath) -> list[StoredPath]:
    """Finished checkpoints, newest first; finished says nothing about damage."""
    found = [path for path in folder.glob(STEP_PREFIX + "*") if parse_step(path.name) is not None and is_finished(path)]
    return sorted(found, key=_step_of, reverse=True)


def is_finished(path: StoredPath) -> bool:
    """Whether a checkpoint has its seal, or is one of those that never had any."""
    if (path / SEAL_NAME).exists():
        return True
    if not (path / STATE_NAME).exists():
        return False
    try:
        return not promises_seal(path)
    except CheckpointError:
        return True


def inspect_checkpoints(folder: StoredPath, accept: Callable[[dict[str, Any]], object], run_id: str) -> list[Candidate]:
    """Looks at every checkpoint of a run, newest first, without reading shards.

    Args:
        folder: `checkpoints` of the run.
        accept: Raises `CheckpointError` for the state of another plan or corpus, or none at all.
        run_id: Of this run.
    """
    found = [path for path in folder.glob(STEP_PREFIX + "*") if path.is_dir() and parse_step(path.name) is not None]
    return [_inspect(path, accept, run_id) for path in sorted(found, key=_step_of, reverse=True)]


def choose_checkpoint(candidates: Sequence[Candidate], prove: Callable[[Candidate], str]) -> Choice:
    """The newest candidate without a fault.

    Args:
        candidates: Newest first.
        prove: Reads the shards of one and returns its fault, or nothing.

    Raises:
        CheckpointError: When there are finished checkpoints and none can be used.
    """
    passed_over: list[Candidate] = []
    for candidate in candidates:
        fault = candidate.fault or prove(candidate)
        if not fault:
            return Choice(candidate, tuple(passed_over))
        passed_over.append(_with_fault(candidate, fault))
    finished = [each for each in passed_over if each.is_finished]
    if finished:
        folder = finished[0].path.parent
        raise CheckpointError(
            f"{folder}: none of {len(finished)} checkpoints can be used: "
            + "; ".join(f"{each.path.name}: {each.fault}" for each in finished)
            + f"; put a good one there, or move {folder} away to train from the beginning"
        )
    return Choice(None, tuple(passed_over))


def _check_shards(path: StoredPath) -> None:
    from layerplan.checkpoint.metadata import check_shards  # with PyTorch, which who lists checkpoints need not load

    check_shards(path)


def prove_candidate(candidate: Candidate) -> str:
    """Reads every file in one process; returns the fault, or nothing."""
    try:
        if candidate.seal is None:
            _check_shards(candidate.path)
        else:
            check_files(candidate.path, candidate.seal)
    except CheckpointError as error:
        return str(error)
    return ""


def prove_checkpoint(path: StoredPath, plan_sha256: str) -> str:
    """Proves one checkpoint by itself, before anything of it is used.

    Returns:
        A warning when it is from before there were seals, else nothing.

    Raises:
        CheckpointError: When it is unfinished, damaged, or of another plan.
    """
    seal = read_seal(path)
    if seal is not None:
        check_files(path, seal)
        _check_identity(path, seal, seal.run_id, plan_sha256)
        return ""
    if (path / STATE_NAME).exists() and promises_seal(path):
        raise CheckpointError(f"{path}: no {SEAL_NAME}; the checkpoint was never finished")
    _check_shards(path)
    return f"{path}: has no seal, as checkpoints of older versions: it cannot be proved undamaged"


def set_aside(choice: Choice) -> None:
    """Moves what was passed over as damaged out of the way, into `set_aside`, where nothing reads it.

    In a bucket, which cannot move a folder, that is the seal and the state: without them the shards are of no
    checkpoint, and stay until their step is saved again.
    """
    for each in choice.passed_over:
        if each.is_finished:
            target = each.path.parent / SET_ASIDE_NAME / each.path.name
            remove_tree(target)
            target.parent.mkdir(exist_ok=True)
            _move(each.path, target)
            write_whole(target / REASON_NAME, f"{each.fault}\n".encode())


def _move(path: StoredPath, target: StoredPath) -> None:
    if isinstance(path, BucketPath) and isinstance(target, BucketPath):
        for name in (SEAL_NAME, STATE_NAME):
            if (path / name).exists():
                (path / name).rename(target / name)
        return
    assert not isinstance(path, BucketPath) and not isinstance(target, BucketPath)
    path.rename(target)


def clear_checkpoint(path: StoredPath) -> None:
    """Makes an empty folder for a save; what an unfinished one left there is no part of the next."""
    path.mkdir(parents=True, exist_ok=True)
    for name in (SEAL_NAME, STATE_NAME, METADATA_NAME):  # from the moment one of them is gone, it does not count
        (path / name).unlink(missing_ok=True)
    for file in path.iterdir():
        if file.is_file():
            file.unlink(missing_ok=True)


def prune_checkpoints(folder: StoredPath, keep: int, in_use: Collection[StoredPath] = ()) -> None:
    """Removes all but the newest finished checkpoints, those in use, and those that wait for their validation."""
    kept = list_checkpoints(folder)[:keep]
    if len(kept) < keep:
        return
    oldest = _step_of(kept[-1])
    for path in folder.glob(STEP_PREFIX + "*"):
        step = parse_step(path.name)
        if step is not None and step < oldest and path not in in_use and not (path / AWAITS_NAME).exists():
            clear_checkpoint(path)
            remove_tree(path)


def find_run_id(folder: StoredPath) -> str:
    """The id in `run_id`, else that of the newest seal, else a new one, which is then written there."""
    file = folder / RUN_ID_NAME
    if file.exists():
        found = file.read_bytes()[:64].decode("ascii", errors="replace").strip()
        if len(found) == 32 and found.isalnum():
            return found
    run_id = next((seal.run_id for seal in map(_try_seal, list_checkpoints(folder)) if seal), uuid.uuid4().hex)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, f"{run_id}\n".encode("ascii"))
    return run_id


def _inspect(path: StoredPath, accept: Callable[[dict[str, Any]], object], run_id: str) -> Candidate:
    step = _step_of(path)
    if not is_finished(path):
        return Candidate(path, step, fault="unfinished", is_finished=False)
    seal = None
    try:
        seal = read_seal(path)
        if seal is not None:
            check_files(path, seal, [STATE_NAME])
            _check_identity(path, seal, run_id, seal.plan_sha256)
        state = read_train_state(path)
        accept(state)
    except CheckpointError as error:
        return Candidate(path, step, seal, fault=str(error))
    return Candidate(path, step, seal, state)


def _check_identity(path: StoredPath, seal: Seal, run_id: str, plan_sha256: str) -> None:
    step = parse_step(path.name)
    if step is not None and seal.step != step:
        raise CheckpointError(f"{path}: its seal is of step {seal.step}")
    if seal.plan_sha256 != plan_sha256:
        raise CheckpointError(f"{path}: of another plan ({seal.plan_sha256[:12]}, not {plan_sha256[:12]})")
    if seal.run_id != run_id:
        raise CheckpointError(f"{path}: of another run ({seal.run_id[:12]}, this one is {run_id[:12]})")


def _try_seal(path: StoredPath) -> Seal | None:
    try:
        return read_seal(path)
    except CheckpointError:
        return None


def _with_fault(candidate: Candidate, fault: str) -> Candidate:
    return Candidate(candidate.path, candidate.step, candidate.seal, candidate.state, fault, candidate.is_finished)


def _describe_passed_over(candidate: Candidate) -> str:
    if not candidate.is_finished:
        return "was never finished"
    return f"is set aside ({candidate.fault})"


def _step_of(path: StoredPath) -> int:
    step = parse_step(path.name)
    return -1 if step is None else step
