"""Arms of a study: the base trained by one plan in a plain loop, and scored row by row on held-out text."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from study_plan import Arm, StudyConfig
from torch import Tensor, nn
from torch.nn import functional as F

from layerplan.config.train import OptimizerConfig, ScheduleConfig
from layerplan.measure.gradients import mean_loss, run_logits
from layerplan.models.freezing import apply_plan
from layerplan.models.ref import ModelRef
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan
from layerplan.train.optim import build_optimizer, compute_clip_scale, compute_grad_norm
from layerplan.train.schedule import compute_lr_scale

LOGITS_AT_ONCE = 1 << 29
"""Float32 numbers: 2 GiB, and as much again for each of the few copies that a backward pass holds."""
SCHEDULE = ScheduleConfig(type="cosine", warmup_ratio=0.1)


class Bench:
    """A loaded base that arm after arm begins from.

    On a GPU up to eight rows pass together, as many as whose logits are held at once, and products of float32 numbers are
    TF32's; on a CPU rows pass one by one.
    """

    def __init__(
        self, model: nn.Module, identity: ModelIdentity, shape: ModelShape, dtype: str, device: str = "cpu"
    ) -> None:
        self.model, self._identity, self._shape, self._dtype = model.to(device), identity, shape, dtype
        self._device, self._rows_at_most = torch.device(device), 1 if device == "cpu" else 8
        if device != "cpu":
            torch.set_float32_matmul_precision("high")
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
        began = time.perf_counter()
        rows, held_out = rows.to(self._device), {text: ids.to(self._device) for text, ids in held_out.items()}
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
        trained = [float(loss) for loss in losses]
        return {"train": trained, "early": early, "final": final, "seconds": time.perf_counter() - began}

    @torch.no_grad()
    def score(self, ids_BT: Tensor) -> list[float]:
        """Mean next-token loss of each row, nats."""
        losses: list[float] = []
        for rows in ids_BT.to(self._device).split(self._count_rows(ids_BT)):
            labels_BT = rows[:, 1:]
            nats = F.cross_entropy(self._run(rows).flatten(0, 1), labels_BT.flatten(), reduction="none")
            losses += nats.view(labels_BT.shape).mean(1).tolist()
        return losses

    def _step(self, optimizer: Any, ids_BT: Tensor, config: OptimizerConfig, step: int, steps: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for rows in ids_BT.split(self._count_rows(ids_BT)):
            loss = mean_loss(self._run(rows), rows[:, 1:]) * (len(rows) / len(ids_BT))
            loss.backward()
            total += loss.detach()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * compute_lr_scale(step, steps, SCHEDULE)
        trained = [value for value in self.model.parameters() if value.grad is not None]
        optimizer.step(grad_scale=compute_clip_scale(compute_grad_norm(trained), config.max_grad_norm))
        return total

    def _count_rows(self, ids_BT: Tensor) -> int:
        """Rows that pass together."""
        return max(1, min(self._rows_at_most, LOGITS_AT_ONCE // (ids_BT.shape[1] * self._shape.vocab_size)))

    def _run(self, ids_BT: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == "bfloat16"):
            return run_logits(self.model, ids_BT)

    def _make_plan(self, arm: Arm) -> FreezePlan:
        full = make_full_plan(self._identity, self._shape)
        if arm.trains_everything:
            return full
        ends: dict[str, Any] = dict.fromkeys(("train_embeddings", "train_final_norm", "train_lm_head"), False)
        tied = "frozen" if self._shape.is_tied else "untied"
        return full.model_copy(
            update={"plan_type": "explicit", "trainable_layers": arm.layers, "tied": tied, **ends}
        ).sealed()


class Benches:
    """Trains arms here, or in processes of their own that share a GPU or the cores."""

    def __init__(self, model: str, study: StudyConfig, rows: Rows, *, device: str, processes: int) -> None:
        self._arguments = (model, study, rows, device)
        self._pool = None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, context, _open_worker, self._arguments)
        else:
            _open_bench(*self._arguments)

    def score_base(self) -> dict[str, list[float]]:
        """Losses of the base on every held-out row."""
        return self._pool.submit(_score_base).result() if self._pool is not None else _score_base()

    def train(self, arms: Sequence[Arm]) -> Iterator[tuple[Arm, dict[str, Any]]]:
        """Results in the order they are finished."""
        if self._pool is None:
            yield from ((arm, _train_arm(arm)) for arm in arms)
            return
        futures = {self._pool.submit(_train_arm, arm): arm for arm in arms}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Rows:
    """What a study trains and scores on."""

    target: Tensor
    """(held-out rows, then rows of each seed, tokens)."""
    source: Tensor
    """(held-out rows, tokens)."""


_opened: list[tuple[Bench, StudyConfig, Rows]] = []
"""The bench of this process, and what it works on."""


def _open_worker(*arguments: Any) -> None:
    """Opens the bench of a process of its own, which ends with the one that started it, however that ends."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    _open_bench(*arguments)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _open_bench(model: str, study: StudyConfig, rows: Rows, device: str) -> None:
    ref = ModelRef(model)
    _opened[:] = [(Bench(ref.load(), ref.identity(), ref.shape(), study.compute_dtype, device), study, rows)]


def _score_base() -> dict[str, list[float]]:
    bench, study, rows = _opened[0]
    bench.restore()
    return {text: bench.score(ids) for text, ids in _hold_out(study, rows).items()}


def _train_arm(arm: Arm) -> dict[str, Any]:
    bench, study, rows = _opened[0]
    return bench.train(arm, study, rows.target[study.find_rows(arm.seed)], _hold_out(study, rows))


def _hold_out(study: StudyConfig, rows: Rows) -> dict[str, Tensor]:
    return {"target": rows.target[: study.held_out_rows], "source": rows.source}


def stack_rows(rows: Sequence[Any]) -> Tensor:
    """Token rows as one tensor."""
    return torch.stack([torch.as_tensor(row, dtype=torch.int64) for row in rows])
