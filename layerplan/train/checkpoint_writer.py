"""Checkpoints of a running training: saved and sealed in the background, reported to Ray, restored in place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn

from layerplan.checkpoint.dcp import Parked, Saving, load_checkpoint, save_checkpoint, writing
from layerplan.checkpoint.index import clear_checkpoint, prune_checkpoints
from layerplan.checkpoint.layout import write_train_state
from layerplan.checkpoint.seal import Seal, mark_bytes, write_seal
from layerplan.errors import CheckpointError
from layerplan.run_folder import AWAITS_NAME, SEAL_NAME, STATE_NAME, name_step
from layerplan.storage.paths import BucketPath, StoredPath
from layerplan.train.resume import Resumed, find_resume
from layerplan.train.state import TrainState

_SEAL_TIMEOUT_S = 60


class Publish(Protocol):
    """Lets a checkpoint be finished while training goes on."""

    def __call__(
        self, state: TrainState, folder: StoredPath, finish: Callable[[], None], *, is_validated: bool
    ) -> None:
        """Has `finish` called, once and in order, from a thread of its own; called on every rank."""
        ...


def publish_to_ray(state: TrainState, folder: StoredPath, finish: Callable[[], None], *, is_validated: bool) -> None:
    """Hands the end of a save to Ray's upload thread, and the checkpoint to Ray Train."""

    def upload(checkpoint: Checkpoint, checkpoint_dir_name: str) -> Checkpoint:
        finish()
        return _as_ray(folder)

    ray.train.report(
        {"step": state.step, "train_loss": state.last_loss, "validation_loss": state.validation_loss},
        checkpoint=_as_ray(folder),
        checkpoint_dir_name=folder.name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=False,
        validation=is_validated,
    )


@dataclass
class CheckpointWriter:
    """Saves in the background; a checkpoint is sealed, or it does not count."""

    checkpoints: StoredPath
    """Folder of the run's checkpoints."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    group: Any
    rank: int
    resumed: Resumed
    """What the run goes on from; its checkpoint is proven."""
    keep: int = 2
    """Newest checkpoints kept."""
    validated_steps: range = range(0)
    """Steps whose checkpoints Ray Train hands to the validation function."""
    parked: Parked = field(default_factory=Parked)
    """What other phases of the plan train."""
    fresh_moments: bool = False
    """Whether parameters may come without moments, as after a change of plan."""
    _newest: StoredPath | None = None
    _is_proven: bool = True
    """Whether the newest one was proved a moment ago: true of the first restore only."""
    publish: Publish = publish_to_ray
    """What finishes a save."""
    before_seal: Callable[[], None] = lambda: None
    """Called on rank 0 when all of a checkpoint but its seal is written: what must not be behind it."""
    _pending: Saving | None = None

    def __post_init__(self) -> None:
        self._newest = self.resumed.checkpoint

    def save(self, state: TrainState) -> None:
        """Starts saving and hands the end of it to whoever finishes it.

        Waits for the save before it: two at once would mix their collectives, and a checkpoint would lack tensors.
        """
        self._wait()
        folder = self.checkpoints / name_step(state.step)
        is_validated = state.step in self.validated_steps
        if self.rank == 0:
            clear_checkpoint(folder)
            if is_validated:
                (folder / AWAITS_NAME).touch()
        saving = save_checkpoint(folder, self.model, self.optimizer, self.group, self.parked)
        self._pending, self._newest = saving, folder

        def finish() -> None:
            saving.wait()
            if self.rank == 0:
                self.before_seal()
                seal_checkpoint(folder, state, saving, self.resumed.run_id)
                prune_checkpoints(folder.parent, self.keep, in_use=(folder,))

        self.publish(state, folder, finish, is_validated=is_validated)

    def restore(self) -> TrainState | None:
        """Loads the newest checkpoint that proves itself into model and optimizer; None when there is none."""
        if self._newest is None:
            return None
        found = self._prove_newest()
        if found.checkpoint is None:
            raise CheckpointError(f"{self._newest}: gone while it was needed")
        load_checkpoint(found.checkpoint, self.model, self.optimizer, fresh_moments=self.fresh_moments)
        self.resumed, self._newest = found, found.checkpoint
        return found.state

    def finish(self) -> Resumed:
        """Returns the newest checkpoint once it is sealed and proven.

        Raises:
            CheckpointError: When it is not what was saved; the next attempt goes on from an older one.
        """
        found = self._prove_newest()
        if found.checkpoint != self._newest:
            raise CheckpointError(f"{self._newest}: damaged since it was written")
        return found

    def _prove_newest(self) -> Resumed:
        self._wait()
        is_resumed = self._newest == self.resumed.checkpoint
        if is_resumed and self._is_proven:
            self._is_proven = False
            return self.resumed
        if self.rank == 0 and not is_resumed:
            self._wait_for_seal()
        return find_resume(self.checkpoints, self.resumed.state, self.rank)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def _wait_for_seal(self) -> None:
        """The upload thread seals a moment after the shards are done."""
        assert self._newest is not None
        deadline = time.monotonic() + _SEAL_TIMEOUT_S
        while not (self._newest / SEAL_NAME).exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self._newest}: no {SEAL_NAME} {_SEAL_TIMEOUT_S} s after its shards were written"
                )
            time.sleep(0.05)


def _as_ray(folder: StoredPath) -> Checkpoint:
    if isinstance(folder, BucketPath):
        filesystem, inner = folder.open_arrow()
        return Checkpoint(inner, filesystem=filesystem)
    return Checkpoint(str(folder))


def seal_checkpoint(folder: StoredPath, state: TrainState, saving: Saving, run_id: str) -> None:
    """Writes the state, then the seal over it and all that was saved; rank 0 does.

    Raises:
        CheckpointError: When they cannot be written.
        StorageError: When the bucket they are kept in fails.
    """
    with writing(folder):
        _write_state_and_seal(folder, state, saving, run_id)


def _write_state_and_seal(folder: StoredPath, state: TrainState, saving: Saving, run_id: str) -> None:
    content = write_train_state(folder, state.model_dump(mode="json"))
    seal = Seal(
        step=state.step,
        tokens_seen=state.tokens_seen,
        plan_sha256=state.plan_sha256,
        corpus_sha256=state.corpus_sha256,
        run_id=run_id,
        files={**saving.marks, STATE_NAME: mark_bytes(content)},
    )
    write_seal(folder, seal)
