"""Frozen layers in FP8, by torchao: as close as eight bits allow, and gradients still reach what trains below them."""

from __future__ import annotations

import pytest
import torch

from layerplan.config.plan import ExplicitPlanConfig
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.freezing import apply_plan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train.fp8 import convert_frozen_layers
from layerplan.train.step import LossModel, make_batch
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_loop import make_rows

VALUES = TINY_QWEN3 | {"tie_word_embeddings": False, "hidden_size": 128, "head_dim": 64, "intermediate_size": 256}


def test_frozen_layers_in_fp8_pass_gradients_on(gpu: torch.device) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = build_tiny_qwen3(**VALUES).to(gpu, torch.bfloat16)
    plan = make_plan(
        ExplicitPlanConfig(trainable=[0], train_embeddings=False, train_lm_head=False),
        model=ModelIdentity(name="tiny", model_type="qwen3", num_layers=3),
        shape=ModelShape.from_hf_config(VALUES),
    )
    apply_plan(model, plan)
    batch = make_batch(make_rows(0, batch=16, vocab_size=40), gpu)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(LossModel(model)(batch), trained)
    errors = convert_frozen_layers(find_decoder_parts(model), plan)
    assert set(errors) == {1, 2} and all(0 < error < 0.08 for error in errors.values())
    grads = torch.autograd.grad(LossModel(model)(batch), trained)
    difference = sum((ours.float() - theirs.float()).square().sum() for ours, theirs in zip(grads, wanted))
    norm = sum(theirs.float().square().sum() for theirs in wanted)
    assert 0 < float((difference / norm).sqrt()) < 0.25
