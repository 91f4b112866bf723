"""Compiled layers, loss and optimizer against the eager ones, through a change of plan."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layerplan.config.plan import ExplicitPlanConfig
from layerplan.config.train import OptimizerConfig, TrainConfig
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train.loop import run_loop
from layerplan.train.sharding import reset_compiled
from layerplan.train.state import TrainState
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_loop import make_loop, make_rows

PHASES = ([2], [0, 1])


def train(*, compiled: bool) -> tuple[nn.Module, list[float]]:
    """Three steps of each phase, over one model; every phase compiles and builds its optimizer anew."""
    source: nn.Module = build_tiny_qwen3()
    identity = ModelIdentity(name="tiny", model_type="qwen3", num_layers=3)
    config = TrainConfig(
        max_steps=3,
        global_batch_size=2,
        micro_batch_size=2,
        compute_dtype="float32",
        compile=compiled,
        attention="eager",
        log_every_steps=1,
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-5),
    )
    losses = []
    for number, layers in enumerate(PHASES):
        model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32, attn_implementation="eager")
        model.load_state_dict(source.state_dict())
        plan = make_plan(
            ExplicitPlanConfig(trainable=list(layers)), model=identity, shape=ModelShape.from_hf_config(TINY_QWEN3)
        )

        def rows_of_step(step: int, number: int = number):  # type: ignore[no-untyped-def]
            return make_rows(step + 3 * number, batch=2, vocab_size=TINY_QWEN3["vocab_size"])

        setup, hooks = make_loop(model, plan, config, rows_of_step=rows_of_step)
        losses.append(run_loop(setup, TrainState(), hooks).last_loss)
        source = model
        reset_compiled()
    return source, losses


def test_compiled_training_equals_eager_training_through_a_change_of_plan() -> None:
    compiled, losses = train(compiled=True)
    eager, expected = train(compiled=False)
    for (name, found), wanted in zip(compiled.named_parameters(), eager.parameters()):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=name)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=1e-5)
