"""Plans in other tools' words: what is written. `benchmarks/plan_exports.py` compares what the tools' own code trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import layerplan
from layerplan.cli import main
from layerplan.config.plan import ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig, FullPlanConfig
from layerplan.errors import PlanError
from layerplan.models.meta import build_without_memory
from layerplan.models.parameter_names import find_selectors, name_parameters
from layerplan.plan.exports import EXPORTS, READ, ParameterNames, export_names, read_rule
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
FAMILIES = {"qwen3": False, "llama": False, "gemma3_text": True}
"""Model type, and whether its embeddings are tied."""


def build(family: str) -> nn.Module:
    config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=FAMILIES[family])
    return build_without_memory(config, name=family)


def names_of(family: str, config: Any) -> ParameterNames:
    values = TINY_QWEN3 | SIZES | {"tie_word_embeddings": FAMILIES[family]}
    shape = ModelShape.from_hf_config(values)
    identity = ModelIdentity(name=family, model_type=family, num_layers=12)
    return name_parameters(build(family), layerplan.make_plan(config, model=identity, shape=shape))


def test_axolotl_gets_patterns_that_do_not_take_layer_10_for_layer_1() -> None:
    names = names_of("qwen3", ExplicitPlanConfig(trainable=[1, 2], train_lm_head=True))
    written = yaml.safe_load(export_names(names, "axolotl"))
    assert written == {"unfrozen_parameters": ["^model.layers.1.", "^model.layers.2.", "^lm_head.weight$"]}
    rule = read_rule(written, "axolotl", num_layers=12)
    assert rule("model.layers.1.mlp.up_proj.weight") and not rule("model.layers.10.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("config", "number"), [(FreezeDeepPlanConfig(boundary=3), -3), (FreezeShallowPlanConfig(boundary=3), 9)]
)
def test_llamafactory_counts_layers_from_one_end(config: Any, number: int) -> None:
    written = yaml.safe_load(export_names(names_of("llama", config), "llamafactory"))
    assert written == {
        "finetuning_type": "freeze",
        "freeze_trainable_layers": number,
        "freeze_trainable_modules": "all",
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ExplicitPlanConfig(trainable=[3, 4]), r"trains the first or the last layers of a model, not layers \[3, 4\]"),
        # a part of a name is enough for it, and every layer has norms of its own
        (FreezeDeepPlanConfig(boundary=3, train_final_norm=True), r"its rule trains model\.layers\.3\..*norm"),
    ],
)
def test_llamafactory_is_refused_what_it_cannot_say(config: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        export_names(names_of("llama", config), "llamafactory")


def test_an_expert_with_a_layers_number_is_noticed() -> None:
    """`.1.` is also expert 1 of every layer where experts are modules of their own."""
    both = [f"model.layers.{layer}.mlp.experts.{expert}.weight" for layer in range(3) for expert in range(2)]
    last = frozenset(name for name in both if name.startswith(("model.layers.1.", "model.layers.2.")))
    names = ParameterNames(tuple(both), last, "model.layers", 3)
    with pytest.raises(
        PlanError, match=r"its rule trains model\.layers\.0\.mlp\.experts\.1\.weight, the plan does not"
    ):
        export_names(names, "llamafactory")
    assert yaml.safe_load(export_names(names, "ms-swift"))["trainable_parameters"] == [
        "model.layers.1.",
        "model.layers.2.",
    ]


def test_peft_gets_lora_on_the_layers_of_the_plan() -> None:
    written = yaml.safe_load(export_names(names_of("gemma3_text", FreezeShallowPlanConfig(boundary=10)), "peft"))
    assert written["layers_to_transform"] == [10, 11] and written["layers_pattern"] == "layers"
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert written["target_modules"] == linear and "modules_to_save" not in written


def test_pefts_copy_of_a_tied_matrix_is_the_heads_too() -> None:
    """Without `ensure_weight_tying` PEFT trains a copy for the embedding and scores with the matrix as it was."""
    from peft import LoraConfig, get_peft_model

    names = names_of("gemma3_text", ExplicitPlanConfig(trainable=[11], train_embeddings=True, train_lm_head=True))
    written = yaml.safe_load(export_names(names, "peft"))
    assert written.pop("peft_type") == "LORA"
    config = AutoConfig.for_model("gemma3_text", **SIZES, tie_word_embeddings=True)
    model: Any = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**written))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    copies = [module.modules_to_save["default"].weight for module in (embedding, head)]
    assert copies[0] is copies[1] and copies[0].requires_grad


@pytest.mark.parametrize(
    ("family", "sizes", "config", "said"),
    [
        # PEFT's switch asks for the name `embed_tokens`
        (
            "gpt2",
            {"n_layer": 12, "n_embd": 16, "n_head": 2, "tie_word_embeddings": True},
            ExplicitPlanConfig(trainable=[3], train_embeddings=True, train_lm_head=True),
            r"trains a copy of transformer\.wte and leaves the head",
        ),
        # the experts of Mixtral get no update, those of DeepSeek-V3 one in every layer, whatever layers are named
        (
            "mixtral",
            {"num_local_experts": 4},
            FreezeDeepPlanConfig(boundary=3),
            r"model\.layers\.0\.mlp\.experts\.gate_up_proj is of several experts at once",
        ),
    ],
)
def test_peft_is_refused_what_it_would_train_otherwise(
    family: str, sizes: dict[str, Any], config: Any, said: str
) -> None:
    built = build_without_memory(AutoConfig.for_model(family, **SIZES | sizes), name=family)
    shape = ModelShape.from_hf_config(TINY_QWEN3 | SIZES | {"tie_word_embeddings": family == "gpt2"})
    identity = ModelIdentity(name=family, model_type=family, num_layers=12)
    names = name_parameters(built, layerplan.make_plan(config, model=identity, shape=shape))
    with pytest.raises(PlanError, match=said):
        export_names(names, "peft")


def test_linear_maps_of_gpt2_are_linear_maps() -> None:
    sizes = {"vocab_size": 64, "n_layer": 12, "n_embd": 16, "n_head": 2}
    built = build_without_memory(AutoConfig.for_model("gpt2", **sizes), name="gpt2")
    shape = ModelShape.from_hf_config(TINY_QWEN3 | SIZES | {"tie_word_embeddings": True})
    identity = ModelIdentity(name="gpt2", model_type="gpt2", num_layers=12)
    names = name_parameters(built, layerplan.make_plan(FreezeDeepPlanConfig(boundary=3), model=identity, shape=shape))
    assert yaml.safe_load(export_names(names, "peft"))["target_modules"] == ["c_attn", "c_fc", "c_proj"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lines_for_python_train_exactly_the_plan(family: str) -> None:
    names = names_of(family, ExplicitPlanConfig(trainable=[0, 1, 11], train_final_norm=True))
    model = build(family)
    exec(export_names(names, "python"), {"model": model})  # as a user pastes them
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names.trainable
    assert "model.norm.weight" in names.trainable and len(names.trainable) > 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tool", READ)
def test_a_plan_comes_back_from_what_was_written(family: str, tool: str) -> None:
    for config in (FreezeDeepPlanConfig(boundary=11), FreezeShallowPlanConfig(boundary=1), FullPlanConfig()):
        names = names_of(family, config)
        if tool == "llamafactory" and isinstance(config, FullPlanConfig):
            continue  # its word for it is another finetuning_type
        rule = read_rule(yaml.safe_load(export_names(names, tool)), tool, num_layers=12)
        fields, modules = find_selectors(build(family), rule)
        assert not modules and names_of(family, ExplicitPlanConfig(**fields)).trainable == names.trainable


@pytest.mark.parametrize(
    ("tool", "values", "said"),
    [
        ("axolotl", {"unfrozen_parameters": ["^model.embed_tokens.weight$[:32000]"]}, "trains some rows of a matrix"),
        (
            "ms-swift",
            {"freeze_parameters_ratio": 0.5},
            "freeze_parameters_ratio=0.5: cuts between parameters by their sizes",
        ),
        ("llamafactory", {"finetuning_type": "lora"}, "finetuning_type='lora': `freeze` or `full` is expected"),
        ("llamafactory", {"finetuning_type": "freeze", "use_llama_pro": True}, "trains layers that it inserts"),
        ("llamafactory", {"finetuning_type": "freeze", "freeze_trainable_layers": "two"}, "'two': a whole number"),
        ("llamafactory", {"finetuning_type": "freeze", "freeze_trainable_layers": True}, "True: a whole number"),
        ("llamafactory", {"finetuning_type": "full", "use_badam": True}, "use_badam=True: trains other layers every"),
        ("axolotl", {"adapter": "lora", "unfrozen_parameters": ["lm_head"]}, "adapter='lora': trains adapters"),
        ("axolotl", {"spectrum_top_fraction": 0.5}, "read the list of unfrozen_parameters that Spectrum writes"),
        # it measures where no share is given too: the plugin has one of its own
        (
            "axolotl",
            {"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]},
            "plugins: axolotl.*SpectrumPlugin: axolotl",
        ),
        ("axolotl", {"unfrozen_parameters": ["layers.(1"]}, r"unfrozen_parameters: .* is no pattern"),
        ("axolotl", {"unfrozen_parameters": 5}, "unfrozen_parameters=5: a list of names is expected"),
        ("ms-swift", {"freeze_parameters_ratio": "much"}, "freeze_parameters_ratio='much': a number is expected"),
        ("ms-swift", {"sft_type": "full", "freeze_parameters": 0.5}, "freeze_parameters=0.5: a list of names"),
        (
            "ms-swift",
            {"tuner_type": "full", "freeze_parameters_regex": "("},
            "freeze_parameters_regex: .* is no pattern",
        ),
        ("axolotl", {"lisa_n_layers": 4}, "lisa_n_layers=4: trains other layers every few steps"),
        ("ms-swift", {"model": "x"}, "tuner_type='lora', which ms-swift takes where it is left out: trains adapters"),
        ("ms-swift", {"train_type": "adalora"}, "train_type='adalora': trains adapters; `full` is expected"),
        ("ms-swift", {"train_type": "full", "lisa_activated_layers": 2}, "lisa_activated_layers=2: trains other"),
        ("peft", {}, "peft: its configurations are not read; those of axolotl, llamafactory, ms-swift are"),
    ],
)
def test_what_no_plan_says_is_refused(tool: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        read_rule(values, tool, num_layers=12)


def test_a_configuration_that_freezes_nothing_trains_everything() -> None:
    for tool, values in (("axolotl", {"base_model": "x"}), ("ms-swift", {"train_type": "full"})):
        fields, modules = find_selectors(build("qwen3"), read_rule(values, tool, num_layers=12))
        ends = {key for key, value in fields.items() if value is True}
        assert fields["trainable"] == list(range(12)) and not modules
        assert ends == {"train_embeddings", "train_final_norm", "train_lm_head"}


def test_what_version_2_of_swift_calls_its_prefixes_is_read() -> None:
    values = {"sft_type": "full", "freeze_parameters_ratio": 1, "additional_trainable_parameters": ["model.layers.1."]}
    rule = read_rule(values, "ms-swift", num_layers=12)
    assert rule("model.layers.1.mlp.up_proj.weight") and not rule("model.layers.2.mlp.up_proj.weight")


def test_names_in_a_list_are_those_between_commas() -> None:
    values = {"finetuning_type": "freeze", "freeze_trainable_modules": ["mlp"], "freeze_extra_modules": ["lm_head"]}
    rule = read_rule(values, "llamafactory", num_layers=12)
    assert rule("model.layers.11.mlp.up_proj.weight") and rule("lm_head.weight")
    assert not rule("model.layers.11.self_attn.q_proj.weight") and not rule("model.layers.9.mlp.up_proj.weight")


def test_a_part_of_a_layer_is_a_plan_and_a_part_of_a_module_is_none() -> None:
    rule = read_rule({"unfrozen_parameters": ["model.layers.3.mlp.up_proj"]}, "axolotl", num_layers=12)
    fields, modules = find_selectors(build("qwen3"), rule)
    assert fields["trainable"] == [3] and modules == {3: ("mlp.up_proj",)}
    with_bias = build_without_memory(AutoConfig.for_model("qwen2", **SIZES), name="qwen2")
    rule = read_rule({"unfrozen_parameters": ["model.layers.3.self_attn.q_proj.weight"]}, "axolotl", num_layers=12)
    with pytest.raises(
        PlanError, match=r"layer 3: model\.layers\.3\.self_attn\.q_proj\.bias stays frozen beside others"
    ):
        find_selectors(with_bias, rule)


def test_both_ways_work_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_tiny_qwen3().save_pretrained(tmp_path / "model")
    config, model, out = tmp_path / "swift.yaml", str(tmp_path / "model"), str(tmp_path / "plan.json")
    config.write_text("tuner_type: full\nfreeze_parameters: [model.embed_tokens, model.layers.0.]\n", encoding="utf-8")
    words = ["--from", "ms-swift", "--model", model, "--out", out]
    assert main(["plan", "import", str(config), *words]) == 0
    assert layerplan.FreezePlan.load(Path(out)).trainable_layers == tuple(range(1, TINY_QWEN3["num_hidden_layers"]))
    config.write_text(
        "tuner_type: full\nfreeze_parameters_ratio: 1\ntrainable_parameters: [model.layers.0.]\n", encoding="utf-8"
    )
    assert main(["plan", "import", str(config), *words]) == 0
    assert layerplan.FreezePlan.load(Path(out)).trainable_layers == (0,)
    capsys.readouterr()
    assert main(["plan", "export", out, "--to", "axolotl", "--model", model]) == 0
    assert capsys.readouterr().out == "unfrozen_parameters:\n- ^model.layers.0.\n"
    assert set(EXPORTS) == {"axolotl", "llamafactory", "ms-swift", "peft", "python"}
