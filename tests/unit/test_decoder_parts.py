"""The parts of a decoder are found by structure: where transformers itself has them, or refused by name."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from layerplan.errors import ModelError, PlanError
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.files import count_layers
from layerplan.models.freezing import AppliedPlan, apply_plan
from layerplan.models.meta import build_without_memory
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.tracer.model_runner import LayerRunner
from tests import families, family_oracle

PLACES = {
    "llama": ("model", "model.layers", "model.norm", "lm_head"),
    "gemma3": ("model", "model.language_model.layers", "model.language_model.norm", "lm_head"),
    "git": ("git", "git.encoder.layer", "", "output"),
    "bert": ("bert", "bert.encoder.layer", "", "cls.predictions.decoder"),
    "mbart": ("model", "model.decoder.layers", "model.decoder.layer_norm", "lm_head"),
    "cpmant": ("cpmant", "cpmant.encoder.layers", "cpmant.encoder.output_layernorm", "lm_head"),
    "bloom": ("transformer", "transformer.h", "transformer.ln_f", "lm_head"),
    "llama4": ("model", "model.layers", "model.norm", "lm_head"),
}  # fmt: skip
"""Trunk, layers, norm after the last layer and head, as transformers' source has them."""


@lru_cache(maxsize=2)
def model_of(model_type: str) -> nn.Module:
    return families.make_model(model_type)


def plan_for(model: nn.Module, kind: str, layers: tuple[int, ...]) -> FreezePlan:
    parts, trains = find_decoder_parts(model), kind == "full"
    tied = ("trained" if trains else "frozen") if parts.is_tied else "untied"
    identity = ModelIdentity(name="tiny", model_type="any", num_layers=len(parts.layers))
    ends = {"train_embeddings": trains, "train_final_norm": trains, "train_lm_head": trains, "tied": tied}
    return FreezePlan(model=identity, plan_type=kind, trainable_layers=layers, reason="a test's", **ends).sealed()


@pytest.mark.parametrize("model_type", PLACES)
def test_the_parts_lie_where_transformers_has_them(model_type: str):
    parts = find_decoder_parts(model_of(model_type))
    assert (parts.trunk_path, parts.layers_path, parts.final_norm_path, parts.lm_head_path) == PLACES[model_type]


@pytest.mark.parametrize(("model_type", "path"), [("lfm2", "model.embedding_norm"), ("bart", "")])
def test_a_norm_named_for_the_embedding_is_the_final_one_only_if_it_runs_after_the_layers(model_type: str, path: str):
    model = model_of(model_type)
    assert find_decoder_parts(model).final_norm_path == path
    without_memory = build_without_memory(model.config, name=model_type)
    assert find_decoder_parts(without_memory).final_norm_path == path


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        (
            "xlm",
            r"XLMWithLMHeadModel: one list of decoder layers .* num_hidden_layers=4, .*transformer\.attentions \(4\)",
        ),
        ("hrm_text", r"HrmTextForCausalLM: one list .* num_hidden_layers=32, .*model\.L_module\.layers \(4\)"),
        ("blt", r"BltForCausalLM: one list .* no num_hidden_layers, .*model\.local_encoder\.layers \(4\)"),
    ],
)
def test_layers_that_are_no_single_list_are_refused_with_what_was_seen(model_type: str, words: str):
    with pytest.raises(ModelError, match=words):
        find_decoder_parts(model_of(model_type))


@pytest.mark.parametrize("model_type", ["gemma3", "bart", "gpt_neo", "mpt", "xglm", "longcat_flash", "nemotron_h"])
def test_layers_are_counted_by_the_config_class_under_whatever_name(model_type: str):
    values = families.make_config(model_type).to_dict()
    assert count_layers({**values, "model_type": model_type}) == families.NUM_LAYERS


def test_a_tower_that_text_does_not_reach_stays_frozen_under_full():
    model = families.make_model("gemma3")
    applied = apply_plan(model, plan_for(model, "full", (0, 1, 2, 3)))
    family_oracle.compute_loss(model, family_oracle.make_documents()).backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None}
    assert applied.trainable == moved and applied.idle == applied.frozen
    assert {name.split(".")[1] for name in applied.idle} == {"vision_tower", "multi_modal_projector"}


def test_keys_compressed_over_many_tokens_are_reached_by_the_longer_probe():
    model = families.make_model("deepseek_v4")
    applied = apply_plan(model, plan_for(model, "full", (0, 1, 2, 3)))
    assert any(".compressor.kv_proj" in name for name in applied.trainable)


def test_every_parameter_of_an_ordinary_decoder_is_reached():
    model = families.make_model("mixtral")
    applied = apply_plan(model, plan_for(model, "full", (0, 1, 2, 3)))
    assert applied == AppliedPlan(frozenset(name for name, _ in model.named_parameters()), frozenset())


@pytest.mark.parametrize(("layers", "is_refused"), [((0, 1), True), ((0, 2), False), ((1, 3), False)])
def test_layers_that_share_parameters_train_together_or_not_at_all(layers: tuple[int, ...], is_refused: bool):
    model = families.make_model("zamba")  # its layers 1 and 3 call one shared transformer block
    plan = plan_for(model, "explicit", layers)
    if not is_refused:
        apply_plan(model, plan)
        return
    with pytest.raises(PlanError, match="layers 1, 3 of the model share parameters"):
        apply_plan(model, plan)


def test_applying_a_plan_leaves_mode_and_random_state_as_they_were():
    model = families.make_model("gpt2").train()
    before = torch.get_rng_state()
    apply_plan(model, plan_for(model, "explicit", (1,)))
    assert model.training and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gemma4_text", "its layers read more than the residual stream"),
        ("gemma3n_text", r"its layers pass on states of shape \(2, 1, 20, 32\)"),
        ("mllama", "on text alone 3 of its 4 layers run"),
        ("gemma4_assistant", "does not run with hooks around its layers"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_traced_is_refused_with_what_was_found(model_type: str, words: str):
    with pytest.raises(ModelError, match=words):
        LayerRunner(model_of(model_type)).check_lens(family_oracle.make_documents()[0])


@pytest.mark.parametrize("model_type", ["openai-gpt", "bert", "bart", "rwkv", "opt"])
@torch.no_grad()
def test_the_lens_is_the_models_own_code_after_its_last_layer(model_type: str):
    model, ids = model_of(model_type), family_oracle.make_documents()[1]
    runner = LayerRunner(model)
    own = model(input_ids=ids).logits.float()
    assert torch.allclose(runner.lens(runner.run(ids)[-1]), own, atol=1e-5)
    assert not torch.allclose(runner.lens(runner.run(ids)[-2]), own, atol=1e-2)
