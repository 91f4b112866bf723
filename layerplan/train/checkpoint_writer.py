"""Checkpoints of a running training: saved in the background, committed through Ray, restored in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from torch import nn

from layerplan.checkpoint.dcp import Parked, load_checkpoint, save_checkpoint
from layerplan.checkpoint.layout import CHECKPOINTS_NAME, STATE_NAME, name_step, read_train_state, write_train_state
from layerplan.train.state import TrainState


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
    parked: Parked = field(default_factory=Parked)
    """What other phases of the plan train."""
    fresh_moments: bool = False
    """Whether parameters may come without moments, as after a change of plan."""
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
        future = save_checkpoint(folder, self.model, self.optimizer, self.group, self.parked)
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
        load_checkpoint(self.newest, self.model, self.optimizer, fresh_moments=self.fresh_moments)
        return expected.check_same_run(self._read_state())

    def finish(self) -> None:
        """Returns once the newest checkpoint is whole on disk, its state file included."""
        self._wait()
        if self.newest is not None:
            self._read_state()
        dist.barrier()

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
