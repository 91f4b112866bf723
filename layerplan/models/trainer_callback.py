"""A freeze plan under the Trainer of `transformers`, and what builds on it (TRL's trainers): obeyed, and proved."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from layerplan.errors import TrainingError
from layerplan.models.freezing import AppliedPlan, apply_plan, check_gradient_coverage, compute_tensor_hashes
from layerplan.plan.freeze_plan import FreezePlan


def plan_callback(plan: FreezePlan) -> PlanCallback:
    """A callback that makes a Trainer train exactly what a plan trains.

    The plan is applied when the Trainer is made, before it makes its optimizer. At the first optimizer step of every
    `train()` exactly the planned parameters must have a gradient, and at the end the frozen ones must have the bytes they had.

    Args:
        plan: Without phases, since the Trainer makes its optimizer once.

    Raises:
        TrainingError: When the plan changes during training; later, from the Trainer, when it was not obeyed.

    Example:
        `Trainer(model, arguments, train_dataset=rows, callbacks=[layerplan.plan_callback(plan)]).train()`
    """
    if plan.phases:
        raise TrainingError(
            f"freeze plan {plan.sha256[:12]}: changes during training, which a Trainer's optimizer does not"
        )
    return PlanCallback(plan)


class PlanCallback(TrainerCallback):
    """Applies and checks one plan; see `plan_callback`."""

    def __init__(self, plan: FreezePlan) -> None:
        self._plan = plan
        self._applied: AppliedPlan | None = None
        self._hashes: dict[str, str] = {}
        self._is_covered = False

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Applies the plan; raises `PlanError` when it does not fit the model."""
        self._applied = apply_plan(model, self._plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Remembers the frozen bytes; raises `TrainingError` when something else was thawed or frozen meanwhile."""
        trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if self._applied is None or trains != self._applied.trainable:
            changed = sorted(trains ^ (self._applied.trainable if self._applied else set()))
            raise TrainingError(
                f"freeze plan {self._plan.sha256[:12]}: {changed[0]} is not as the plan says; nothing else may set requires_grad"
            )
        self._hashes = compute_tensor_hashes(self._list_frozen(model))
        self._is_covered = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Raises `TrainingError` when at the first step other parameters have a gradient than the planned ones."""
        if not self._is_covered and self._applied is not None:
            check_gradient_coverage(model, self._applied)
            self._is_covered = True

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Raises `TrainingError` when a frozen parameter has changed."""
        now = compute_tensor_hashes(self._list_frozen(model))
        moved = [name for name, value in self._hashes.items() if now[name] != value]
        if moved:
            raise TrainingError(
                f"freeze plan {self._plan.sha256[:12]}: {len(moved)} of {len(now)} frozen parameters changed, {moved[0]} first"
            )

    def _list_frozen(self, model: nn.Module) -> dict[str, Tensor]:
        assert self._applied is not None, "the Trainer was made with the callback"
        return {name: parameter for name, parameter in model.named_parameters() if name in self._applied.frozen}
