"""One arm of a study: the base trained by one plan in a plain loop, and scored row by row on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from study_plan import Arm, StudyConfig
from torch import Tensor, nn

from layerplan.config.train import OptimizerConfig, ScheduleConfig
from layerplan.measure.gradients import mean_loss, run_logits
from layerplan.models.freezing import apply_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan
from layerplan.train.optim import build_optimizer, compute_clip_scale, compute_grad_norm
from layerplan.train.schedule import compute_lr_scale

SCHEDULE = ScheduleConfig(type="cosine", warmup_ratio=0.1)


class Bench:
    """A loaded base that arm after arm begins from."""

    def __init__(self, model: nn.Module, identity: ModelIdentity, shape: ModelShape) -> None:
        self.model, self._identity, self._shape = model, identity, shape
        self._base = {name: value.detach().clone() for name, value in model.named_parameters()}

    def restore(self) -> None:
        """Gives the model its base's weights again."""
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(self._base[name])
                value.grad = None

    def train(self, arm: Arm, study: StudyConfig, rows: Tensor, held_out: dict[str, Tensor]) -> dict[str, Any]:
        """Trains and scores an arm.

        Args:
            arm: What trains, at which rate.
            study: Steps and when to score.
            rows: Training rows in order, (steps * rows per step, tokens).
            held_out: `target` and `source` rows.

        Returns:
            Final losses of every row by text, early losses by step, training losses, seconds.
        """
        began = time.process_time()
        self.restore()
        apply_plan(self.model, self._make_plan(arm))
        config = OptimizerConfig(learning_rate=arm.rate)
        optimizer = build_optimizer(self.model, config)
        reads = {max(1, math.ceil(share * arm.steps)) for share in study.read_at} - {arm.steps}
        early: dict[str, dict[str, list[float]]] = {}
        losses = []
        for step in range(arm.steps):
            batch = rows[step * study.rows_per_step : (step + 1) * study.rows_per_step]
            losses.append(self._step(optimizer, batch, config, step, arm.steps))
            if step + 1 in reads:
                early[str(step + 1)] = {text: self.score(ids[: study.early_rows]) for text, ids in held_out.items()}
        final = {text: self.score(ids) for text, ids in held_out.items()}
        return {"train": losses, "early": early, "final": final, "cpu_seconds": time.process_time() - began}

    @torch.no_grad()
    def score(self, ids_BT: Tensor) -> list[float]:
        """Mean next-token loss of each row, nats."""
        return [float(mean_loss(run_logits(self.model, row), row[:, 1:])) for row in ids_BT.split(1)]

    def _step(self, optimizer: Any, ids_BT: Tensor, config: OptimizerConfig, step: int, steps: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for row in ids_BT.split(1):
            loss = mean_loss(run_logits(self.model, row), row[:, 1:]) / len(ids_BT)
            loss.backward()
            total += float(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * compute_lr_scale(step, steps, SCHEDULE)
        trained = [value for value in self.model.parameters() if value.grad is not None]
        optimizer.step(grad_scale=compute_clip_scale(compute_grad_norm(trained), config.max_grad_norm))
        return total

    def _make_plan(self, arm: Arm) -> FreezePlan:
        full = make_full_plan(self._identity, self._shape)
        if arm.trains_everything:
            return full
        ends: dict[str, Any] = dict.fromkeys(("train_embeddings", "train_final_norm", "train_lm_head"), False)
        tied = "frozen" if self._shape.is_tied else "untied"
        return full.model_copy(
            update={"plan_type": "explicit", "trainable_layers": arm.layers, "tied": tied, **ends}
        ).sealed()


def stack_rows(rows: Sequence[Any]) -> Tensor:
    """Token rows as one tensor."""
    return torch.stack([torch.as_tensor(row, dtype=torch.int64) for row in rows])
