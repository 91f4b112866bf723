"""Adapters against PEFT's own model: forward, backward, and the folder it saves and reads."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from layerplan.config.finetune import LoraOptions
from layerplan.config.train import TrainConfig
from layerplan.errors import ModelError
from layerplan.models.adapters import (
    WRAPPING,
    compute_merged,
    count_adapter_params,
    inject_adapters,
    list_adapter_tensors,
    save_adapter,
    wrap_adapters,
)
from layerplan.models.freezing import apply_plan, check_gradient_coverage
from layerplan.models.ref import ModelRef
from layerplan.pipeline.merge_adapter import merge_adapter
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.memory import estimate_memory
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.placement import Placement
from layerplan.plan.policies import make_full_plan
from layerplan.train.label_step import LabelLossModel, make_label_batches
from layerplan.train.materialize import ParameterSource
from layerplan.train.optim import build_optimizer
from layerplan.train.request import LabelOptions
from layerplan.train.sharding import place_model
from layerplan.train.step import accumulate_gradients
from tests.model_folders import save_tiny_base
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_labels import draw, plan_all

peft = pytest.importorskip("peft")
OPTIONS = LoraOptions(rank=2, alpha=6)
IDS = torch.arange(8)[None]


def shake(named: dict[str, nn.Parameter]) -> None:
    """Adapters begin as nothing: B is zero. Drawn by name, so that two models get the same ones."""
    with torch.no_grad():
        for name, value in sorted(named.items()):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix(WRAPPING): each for name, each in model.named_parameters() if "lora_" in name}


def build_plain() -> nn.Module:
    """PEFT's own model with a config written by hand, on the last two of three layers."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=names, layers_to_transform=[1, 2], bias="none"
    )
    return peft.get_peft_model(build_tiny_qwen3(), config)


def test_forward_and_backward_are_those_of_pefts_own_model() -> None:
    plain, ours = build_plain(), build_tiny_qwen3()
    applied = inject_adapters(ours, [1, 2], OPTIONS, seed=0)
    assert applied.trainable == set(adapters_of(plain)) and len(applied.trainable) == 2 * 7 * 2
    for model in (plain, ours):
        shake(adapters_of(model))
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, ours(IDS).logits)
    model = LabelLossModel(ours, options=LabelOptions())
    rows = draw([1, 1])
    accumulate_gradients(model, make_label_batches(rows, 1, torch.device("cpu")), 1.0)
    check_gradient_coverage(model, applied)
    for row in range(2):
        ids = torch.from_numpy(rows.input_ids[row][rows.document_ids[row] >= 0]).long()
        nn.functional.cross_entropy(plain(ids[None, :-1]).logits[0, -1:], ids[-1:]).backward()
    for name, value in adapters_of(plain).items():
        assert value.grad is not None
        assert torch.allclose(value.grad, dict(ours.named_parameters())[name].grad, atol=1e-6)


def test_a_start_layer_leaves_the_adapters_below_it_alone() -> None:
    ours = build_tiny_qwen3()
    inject_adapters(ours, [0, 1, 2], OPTIONS, seed=0)
    model = LabelLossModel(ours, options=LabelOptions())
    accumulate_gradients(model, make_label_batches(draw([2]), 1, torch.device("cpu")), 1.0)
    moved = {name.split(".layers.")[1][0] for name, value in model.named_parameters() if value.grad is not None}
    assert moved == {"2"}


def test_the_saved_folder_is_one_that_peft_reads_and_the_merged_matrices_are_its_own(tmp_path: Path) -> None:
    values = dict(adapters_of(build_plain()))
    shake(values)
    wrapped = wrap_adapters(build_tiny_qwen3(), [1, 2], OPTIONS, {name: each.data for name, each in values.items()})
    identity = ModelIdentity(name="tiny", model_type="qwen3", num_layers=3)
    save_adapter(wrapped, tmp_path / "adapter", ModelRef("some/base"), identity)
    loaded = peft.PeftModel.from_pretrained(build_tiny_qwen3(), tmp_path / "adapter")
    assert all(torch.equal(value, values[name]) for name, value in list_adapter_tensors(loaded).items())
    merged = dict(loaded.merge_and_unload().named_parameters())
    base = build_tiny_qwen3()
    found = compute_merged(wrapped, base, base.get_parameter)
    assert len(found) == 14 and all(torch.allclose(value, merged[name], atol=1e-7) for name, value in found.items())


def test_an_adapter_is_merged_into_its_own_base_and_refused_by_another(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    build_tiny_qwen3().save_pretrained(base)
    build_tiny_qwen3(num_hidden_layers=4).save_pretrained(other)
    values = dict(adapters_of(build_plain()))
    shake(values)
    wrapped = wrap_adapters(build_tiny_qwen3(), [1, 2], OPTIONS, {name: each.data for name, each in values.items()})
    save_adapter(wrapped, tmp_path / "adapter", ModelRef(str(base)), ModelRef(str(base)).identity())
    merge_adapter(tmp_path / "adapter", ModelRef(str(base)), tmp_path / "merged")
    with torch.no_grad():
        found = ModelRef(str(tmp_path / "merged")).load()(IDS).logits
        assert torch.allclose(found, wrapped(IDS).logits, atol=1e-5)
    with pytest.raises(ModelError, match=r"the adapter belongs to .*base \(weights .*\), not to .*other") as told:
        merge_adapter(tmp_path / "adapter", ModelRef(str(other)), tmp_path / "wrong")
    assert "\n" not in str(told.value) and not (tmp_path / "wrong").exists()
    (tmp_path / "adapter" / "adapter_base.json").unlink()
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        merge_adapter(base, ModelRef(str(base)), tmp_path / "wrong")


ON = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
LORA = ON | {"r": 2, "lora_alpha": 6}
UNTIED = {"tie_word_embeddings": False}
KINDS = {
    "whole modules": (peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head", "norm"]), UNTIED),
    "dora": (peft.LoraConfig(**LORA, use_dora=True), {}),
    "biases": (peft.LoraConfig(**LORA, bias="all"), {"attention_bias": True}),
    "tokens": (peft.LoraConfig(**LORA, trainable_token_indices=[0, 3]), {}),
    "ia3": (peft.IA3Config(**ON, feedforward_modules=["down_proj"]), {}),
    "rslora": (peft.LoraConfig(**LORA, use_rslora=True, rank_pattern={"q_proj": 4}), {}),
}
"""As people train them; each changes more than a low-rank product beside a matrix, or by another factor."""
UNMERGEABLE = {
    "embeddings alone": (peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]), "has one tensor for both"),
    "beside tied ones": (peft.LoraConfig(**LORA | {"target_modules": ["embed_tokens"]}), "gives other logits than"),
    "prefix": (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "PREFIX_TUNING: PEFT cannot merge",
    ),
}


def save_as_peft(config: peft.PeftConfig, folder: Path, **changes: bool) -> ModelRef:
    """A base and an adapter of it whose values are not those of its start."""
    build_tiny_qwen3(**changes).save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(build_tiny_qwen3(**changes), config)
    generator = torch.Generator().manual_seed(0)
    for value in (each.data for each in wrapped.parameters() if each.requires_grad):
        value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(str(folder / "adapter"))
    return ModelRef(str(folder / "base"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_adapted_one_whatever_the_adapter_changes(kind: str, tmp_path: Path) -> None:
    config, changes = KINDS[kind]
    base = save_as_peft(config, tmp_path, **changes)
    merge_adapter(tmp_path / "adapter", base, tmp_path / "merged")
    with torch.no_grad():
        plain, found = base.load()(IDS).logits, ModelRef(str(tmp_path / "merged")).load()(IDS).logits
        adapted = peft.PeftModel.from_pretrained(base.load(), str(tmp_path / "adapter"))(IDS).logits
    assert torch.allclose(found, adapted, atol=1e-5) and not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_an_adapter_that_no_base_can_hold_is_refused(kind: str, tmp_path: Path) -> None:
    config, reason = UNMERGEABLE[kind]
    base = save_as_peft(config, tmp_path)
    with pytest.raises(ModelError, match=reason) as told:
        merge_adapter(tmp_path / "adapter", base, tmp_path / "merged")
    assert "\n" not in str(told.value) and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_beside_a_base_without_memory_are_those_beside_the_base(tmp_path: Path, dtype: str) -> None:
    base = ModelRef(str(save_tiny_base(tmp_path / "base")))
    plan = make_full_plan(base.identity(), base.shape())
    config = TrainConfig(max_steps=1, num_workers=1, compute_dtype=dtype)
    skeleton = base.skeleton()
    placed = []
    for model, source in ((base.load(), None), (skeleton.model, ParameterSource(skeleton.reader))):
        apply_plan(model, plan)
        inject_adapters(model, [1, 2], OPTIONS, seed=3)
        place = {"world_size": 1, "device": torch.device("cpu"), "source": source}
        placed.append(place_model(model, plan, config, Placement("replicate", "replicate"), **place))
    whole, read = (dict(each.model.named_parameters()) for each in placed)
    assert list(whole) == list(read)
    for name, value in whole.items():
        assert value.requires_grad == read[name].requires_grad == ("lora_" in name)
        assert value.dtype == read[name].dtype == getattr(torch, dtype)
        assert torch.equal(value, read[name]), name
    masters = [
        {name: each.masters[id(p)] for name, p in each.model.named_parameters() if id(p) in each.masters}
        for each in placed
    ]
    assert (
        masters[0].keys() == masters[1].keys() == (set() if dtype == "float32" else {n for n in whole if "lora_" in n})
    )
    assert all(torch.equal(value, masters[1][name]) for name, value in masters[0].items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_adapters_need_is_predicted_to_the_byte(dtype: str) -> None:
    """Weights of the base, and of the adapters weights, masters, gradients and moments, counted after a step."""
    model, layers = build_tiny_qwen3(), [1, 2]
    config = TrainConfig(max_steps=1, global_batch_size=2, micro_batch_size=2, compute_dtype=dtype)
    plan, placement = plan_all(3), Placement("replicate", "replicate")
    shape = ModelShape.from_hf_config(TINY_QWEN3)
    count = count_adapter_params(model, layers, OPTIONS)
    apply_plan(model, plan)
    inject_adapters(model, layers, OPTIONS, seed=0)
    assert count == sum(each.numel() for each in adapters_of(model).values())
    with_labels = partial(LabelLossModel, options=LabelOptions())
    place = {"world_size": 1, "device": torch.device("cpu"), "loss_model": with_labels}
    placed = place_model(model, plan, config, placement, **place)
    optimizer = build_optimizer(placed.model, config.optimizer, masters=placed.masters)
    placed.masters.clear()
    accumulate_gradients(placed.model, make_label_batches(draw([1, 1]), 2, torch.device("cpu")), 1.0)
    optimizer.step()
    parameters = list(placed.model.parameters())
    held = [*parameters, *(each.grad for each in parameters if each.grad is not None)]
    held += [
        each for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each) and each.ndim
    ]
    counted = sum(each.numel() * each.element_size() for each in held)
    limits = {"seq_len": 8, "world_size": 1, "device_type": "cpu"}
    prompts = {"adds_up": True}  # those of different start layers are micro-batches of their own
    predicted = estimate_memory(plan, shape, config, placement, adapter_params=count, **limits, **prompts)
    assert predicted.parameters == counted
    full = estimate_memory(plan, shape, config, placement, **limits, **prompts)
    assert full.parameters > 2 * predicted.parameters and full.activations == predicted.activations
