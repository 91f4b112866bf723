"""A plan under the Trainer of transformers itself: obeyed, proved, and a breach found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import layerplan
from layerplan.config.plan import FreezeDeepPlanConfig, RotationPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import TrainingError
from layerplan.plan.decide import PlanContext, resolve_plan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3

LAYERS = TINY_QWEN3["num_hidden_layers"]
PLAN = layerplan.make_plan(
    FreezeDeepPlanConfig(boundary=1),
    model=ModelIdentity(name="tiny", model_type="qwen3", num_layers=LAYERS),
    shape=ModelShape.from_hf_config(TINY_QWEN3),
)


def train(folder: Path, model: nn.Module, *more: TrainerCallback) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": row, "labels": row}
        for row in torch.randint(TINY_QWEN3["vocab_size"], (8, 12), generator=generator)
    ]
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 3, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(folder), save_strategy="no", disable_tqdm=True, learning_rate=1e-2, **options)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[layerplan.plan_callback(PLAN), *more])
    trainer.train()
    return trainer


def test_a_trainer_trains_the_plan_and_nothing_else(tmp_path: Path) -> None:
    model = build_tiny_qwen3()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(tmp_path, model)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.startswith("model.layers.0.")}


class Meddler(TrainerCallback):
    """Breaks the plan in one of three ways."""

    def __init__(self, way: str) -> None:
        self._way = way

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if self._way == "thaw":
            model.get_parameter("model.norm.weight").requires_grad_(True)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if self._way == "cut":
            model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if self._way == "move":
            model.get_parameter("model.norm.weight").data += 1


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("thaw", r"model\.norm\.weight is not as the plan says"),
        ("cut", r"model\.layers\.0\.mlp\.up_proj\.weight"),
        ("move", r"1 of \d+ frozen parameters changed, model\.norm\.weight first"),
    ],
)
def test_a_breach_of_the_plan_is_found(tmp_path: Path, way: str, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        train(tmp_path, build_tiny_qwen3(), Meddler(way))


def test_a_plan_that_changes_is_refused() -> None:
    context = PlanContext(PLAN.model, ModelShape.from_hf_config(TINY_QWEN3), TrainConfig(max_steps=4), 16, None)
    phased = resolve_plan(RotationPlanConfig(k=1, period_steps=1), context)
    with pytest.raises(TrainingError, match="changes during training"):
        layerplan.plan_callback(phased)
