"""A plan on a real model: exactly the planned tensors move, and a violation on purpose is found."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from layerplan.config.plan import ExplicitPlanConfig, FreezeShallowPlanConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import PlanError, TrainingError
from layerplan.models.freezing import apply_plan, check_gradient_coverage, compute_tensor_hashes
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train import frozen_check
from layerplan.train.frozen_check import FrozenTensors
from layerplan.train.loop import run_loop
from layerplan.train.loop_setup import LoopHooks, LoopSetup
from layerplan.train.state import TrainState
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_loop import make_loop, make_rows

VALUES = TINY_QWEN3 | {"num_hidden_layers": 4}
MODEL = ModelIdentity(name="tiny", model_type="qwen3", num_layers=4)


def build(*, tied: bool) -> nn.Module:
    return build_tiny_qwen3(**VALUES | {"tie_word_embeddings": tied})


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


@pytest.mark.parametrize("seed", range(6))
def test_optimizer_state_exists_for_exactly_the_planned_tensors(seed: int):
    """One step of the real loop under a random plan; frozen gradients are None after it as well."""
    rng = random.Random(100 + seed)
    tied = rng.random() < 0.5
    options = {"tied": rng.choice(["frozen", "trained"])} if tied else {"train_embeddings": rng.random() < 0.5}
    layers = rng.sample(range(4), rng.randint(1, 4))
    model, plan = build(tied=tied), plan_for(ExplicitPlanConfig(trainable=layers, **options), tied=tied)
    before = compute_tensor_hashes(dict(model.named_parameters()))
    setup, hooks = two_steps(model, plan)
    state = run_loop(setup, TrainState(), hooks)
    named = dict(model.named_parameters())
    with_state = {name for name, value in named.items() if setup.optimizer.state.get(value)}
    assert with_state == setup.applied.trainable
    assert sum(len(group["params"]) for group in setup.optimizer.param_groups) == len(setup.applied.trainable)
    assert all(named[name].grad is None for name in setup.applied.frozen)
    after = compute_tensor_hashes(named)
    assert {name for name in before if before[name] != after[name]} == set(setup.applied.trainable)
    assert state.frozen_checks == 1 and state.coverage_checks == 1


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
    saved: list[TrainState] = []
    setup, hooks = two_steps(model, plan_for(FreezeShallowPlanConfig(boundary=2), tied=True), saved)
    dict(model.named_parameters())[f"model.layers.{layer}.mlp.up_proj.weight"].requires_grad_(trains)
    before = compute_tensor_hashes(dict(model.named_parameters()))
    with pytest.raises(TrainingError, match=f"{words}.*layers.{layer}.mlp.up_proj"):
        run_loop(setup, TrainState(), hooks)
    assert compute_tensor_hashes(dict(model.named_parameters())) == before
    assert saved == []


def two_steps(model: nn.Module, plan: FreezePlan, saved: list[TrainState] | None = None) -> tuple[LoopSetup, LoopHooks]:
    """Two steps, a checkpoint at the last."""
    config = TrainConfig(max_steps=2, global_batch_size=2, micro_batch_size=2, compute_dtype="float32")
    save = (lambda state: None) if saved is None else saved.append
    return make_loop(model, plan, config, rows_of_step=lambda step: make_rows(step, batch=2, vocab_size=40), save=save)


def test_a_frozen_tensor_that_moves_stops_the_run_before_anything_is_saved():
    """One bit of one frozen element is flipped between two checkpoints."""
    model = build(tied=True)
    saved: list[TrainState] = []
    setup, hooks = two_steps(model, plan_for(FreezeShallowPlanConfig(boundary=2), tied=True), saved)
    words = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"].data.view(torch.int32)
    words[3, 5] ^= 1
    with pytest.raises(
        TrainingError, match=r"1 of 24 changed .*layers.1.mlp.up_proj.weight.*no checkpoint was made of it"
    ):
        run_loop(setup, TrainState(), hooks)
    assert saved == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_checksum_is_the_sum_of_odd_multiples_of_the_words(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frozen_check, "_CHUNK", 100)
    torch.manual_seed(3)
    value = torch.randn(23, 17).to(dtype)
    bits = value.reshape(-1).view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[value.element_size()]).tolist()
    expected = sum((2 * place + 1) * word for place, word in enumerate(bits)) % 2**64
    found = frozen_check.compute_checksums({"w": value})["w"]
    assert found % 2**64 == expected
    swapped = value.clone()
    swapped[0], swapped[1] = value[1], value[0]
    assert frozen_check.compute_checksums({"w": swapped})["w"] != found


def test_a_resumed_run_refuses_other_frozen_bytes_and_says_nothing_of_another_dtype():
    model, other = build(tied=True), build(tied=True)
    plan = plan_for(FreezeShallowPlanConfig(boundary=2), tied=True)
    first = two_steps(model, plan)[0].frozen
    second = two_steps(other, plan)[0].frozen
    assert first is not None and second is not None
    second.check_same_as(first.digest)
    dict(other.named_parameters())["model.embed_tokens.weight"].data[0, 0] += 1
    third = FrozenTensors(other, "float32")
    with pytest.raises(TrainingError, match="the model's files changed between the attempts"):
        third.check_same_as(first.digest)
    FrozenTensors(other, "bfloat16").check_same_as(first.digest)


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
