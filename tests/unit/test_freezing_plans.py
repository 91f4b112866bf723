"""A plan on a real model: exactly the planned tensors move, and a violation on purpose is found."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from layerplan.config.plan import ExplicitPlanConfig, FreezeShallowPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.errors import PlanError, TrainingError
from layerplan.models.freezing import apply_plan, check_gradient_coverage, compute_tensor_hashes
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_plan
from layerplan.train.loop import LoopHooks, LoopSetup, run_loop
from layerplan.train.optim import build_optimizer
from layerplan.train.sharding import place_model
from layerplan.train.state import TrainState

VALUES = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
MODEL = ModelIdentity(name="tiny", model_type="qwen3", num_layers=4)


def build(*, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**VALUES, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def plan_for(config: object, *, tied: bool) -> FreezePlan:
    shape = ModelShape.from_hf_config({**VALUES, "tie_word_embeddings": tied})
    return make_plan(config, model=MODEL, shape=shape)  # type: ignore[arg-type]


def step(model: nn.Module) -> None:
    ids = torch.arange(24).reshape(2, 12) % 40
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@pytest.mark.parametrize("seed", range(12))
def test_exactly_the_planned_tensors_change(seed: int):
    rng = random.Random(seed)
    tied = rng.random() < 0.5
    layers = rng.sample(range(4), rng.randint(1, 4))
    options = {"train_final_norm": rng.random() < 0.5}
    if tied:
        options["tied"] = rng.choice(["frozen", "trained", "head_only"])
    else:
        options |= {"train_embeddings": rng.random() < 0.5, "train_lm_head": rng.random() < 0.5}
    plan = plan_for(ExplicitPlanConfig(trainable=layers, **options), tied=tied)
    model = build(tied=tied)
    before = compute_tensor_hashes(dict(model.named_parameters()))
    applied = apply_plan(model, plan)
    step(model)
    check_gradient_coverage(model, applied)
    after = compute_tensor_hashes(dict(model.named_parameters()))
    assert {name for name in before if before[name] != after[name]} == set(applied.trainable)
    assert applied.trainable | applied.frozen == set(before) and not applied.trainable & applied.frozen


def test_a_gradient_on_a_frozen_tensor_is_found():
    model = build(tied=True)
    applied = apply_plan(model, plan_for(FreezeShallowPlanConfig(boundary=2), tied=True))
    step(model)
    frozen = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    frozen.grad = torch.zeros_like(frozen)
    with pytest.raises(TrainingError, match=r"1 frozen parameters have one .*layers.0.mlp.up_proj"):
        check_gradient_coverage(model, applied)


def test_a_trained_tensor_without_a_gradient_is_found():
    model = build(tied=True)
    applied = apply_plan(model, plan_for(FreezeShallowPlanConfig(boundary=2), tied=True))
    step(model)
    dict(model.named_parameters())["model.layers.3.mlp.up_proj.weight"].grad = None
    with pytest.raises(TrainingError, match="1 trainable parameters have no gradient"):
        check_gradient_coverage(model, applied)


@pytest.mark.parametrize(
    ("layer", "trains", "words"),
    [(0, True, "1 frozen parameters have one"), (3, False, "1 trainable parameters have no gradient")],
)
def test_the_training_loop_stops_at_step_1_when_the_plan_is_not_obeyed(layer: int, trains: bool, words: str):
    """One parameter is set against the plan behind the loop's back; no update and no checkpoint is made."""
    model = build(tied=True)
    applied = apply_plan(model, plan_for(FreezeShallowPlanConfig(boundary=2), tied=True))
    dict(model.named_parameters())[f"model.layers.{layer}.mlp.up_proj.weight"].requires_grad_(trains)
    before = compute_tensor_hashes(dict(model.named_parameters()))
    config = TrainConfig(max_steps=2, global_batch_size=2, micro_batch_size=2, compute_dtype="float32")
    plan, device = plan_for(FreezeShallowPlanConfig(boundary=2), tied=True), torch.device("cpu")
    placed = place_model(model, plan, config, Placement("replicate", "replicate"), world_size=1, device=device)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters)
    ids = np.arange(24, dtype=np.int32).reshape(2, 12) % 40
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    rows = PackedRows(np.arange(2), ids, np.zeros_like(ids), positions)
    saved: list[TrainState] = []
    hooks = LoopHooks(lambda start, stop: iter([rows] * (stop - start)), saved.append, lambda: False, None, None)
    setup = LoopSetup(placed, optimizer, applied, config, device, rank=0, world_size=1)
    with pytest.raises(TrainingError, match=f"{words}.*layers.{layer}.mlp.up_proj"):
        run_loop(setup, TrainState(), hooks)
    assert compute_tensor_hashes(dict(model.named_parameters())) == before
    assert saved == []


def test_head_only_trains_the_shared_matrix_through_the_head_alone():
    plan = plan_for(FreezeShallowPlanConfig(boundary=2, tied="head_only"), tied=True)
    model, reference = build(tied=True), build(tied=True)
    reference_head = copy.deepcopy(reference.lm_head)
    apply_plan(model, plan)
    ids = torch.arange(24).reshape(2, 12) % 40
    model(input_ids=ids, labels=ids).loss.backward()
    hidden = reference.model(input_ids=ids).last_hidden_state.detach()
    logits = reference_head(hidden)[:, :-1]
    nn.functional.cross_entropy(logits.reshape(-1, 40), ids[:, 1:].reshape(-1)).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, reference_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_plan_for_tied_embeddings_is_refused_on_untied_ones():
    with pytest.raises(PlanError, match="embeddings are not tied"):
        apply_plan(build(tied=False), plan_for(FreezeShallowPlanConfig(boundary=2), tied=True))
