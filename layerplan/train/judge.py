"""What takes the place of the validation where trainings are compared: losses row by row, told as they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from layerplan.corpus.rows import PackedRows
from layerplan.train.held_out_rows import RowLosses, hash_rows, load_losses, load_texts, save_losses
from layerplan.train.request import Judging
from layerplan.train.state import TrainState
from layerplan.train.step import LossModel
from layerplan.train.validation import compute_row_losses

VALIDATION = "validation_loss"
"""Stands for the corpus's own held-out rows among the names of texts, and for the loss on them."""


@dataclass(frozen=True)
class HeldOutJudge:
    """Measures a model as it trains; called on every rank."""

    model: LossModel
    texts: Mapping[str, PackedRows]
    judging: Judging
    max_steps: int
    device: torch.device
    rank: int
    world_size: int
    tell: Callable[[dict[str, Any]], None]
    """Takes what was measured, on rank 0."""

    def __call__(self, state: TrainState) -> float | None:
        """Measures, writes the losses of base and result, and returns that on the corpus's own held-out rows."""
        if state.step == 0:
            losses = self._share(load_losses(self.judging.base))
            if all(name in losses and losses[name].rows_sha256 == hash_rows(rows) for name, rows in self.texts.items()):
                return _mean(losses.get(VALIDATION))
        is_last = state.step >= self.max_steps
        wanted = self.texts if state.step == 0 or is_last else {VALIDATION, self.judging.metric}
        losses = {name: self._measure(rows) for name, rows in self.texts.items() if name in wanted}
        if self.rank == 0:
            if state.step == 0 or is_last:
                save_losses(self.judging.base if state.step == 0 else self.judging.result, losses)
            if state.step > 0:
                self.tell({"step": state.step, "train_loss": state.last_loss, **_list_means(losses)})
        return _mean(losses.get(VALIDATION))

    def _measure(self, rows: PackedRows) -> RowLosses:
        place = {"device": self.device, "rank": self.rank, "world_size": self.world_size}
        return RowLosses(*compute_row_losses(self.model, rows, **place), hash_rows(rows))

    def _share(self, losses: dict[str, RowLosses]) -> dict[str, RowLosses]:
        """What rank 0 found: another training may write the file at this moment."""
        box = [losses]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]


def read_texts(judging: Judging, validation: PackedRows | None) -> dict[str, PackedRows]:
    """The corpus's own held-out rows and the further texts, by name."""
    own = {} if validation is None else {VALIDATION: validation}
    return own | ({} if judging.texts is None else load_texts(judging.texts))


def _mean(losses: RowLosses | None) -> float | None:
    return None if losses is None else losses.mean


def _list_means(losses: Mapping[str, RowLosses]) -> dict[str, float]:
    return {name: each.mean for name, each in losses.items()}
