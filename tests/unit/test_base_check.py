"""What is no base model is refused in one line, from the files alone and again at loading; what is one passes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_families import make_config
from transformers import AutoModelForCausalLM

from layerplan.errors import ModelError
from layerplan.models.base_check import check_base_model
from layerplan.models.causal_lm import load_causal_lm
from tests.model_folders import edit_config, edit_weights, save_base_with_code, save_tiny_base

UP = "model.layers.2.mlp.up_proj.weight"


def refuses(folder: Path, pattern: str, *, at_loading: bool = True) -> None:
    """Both the look at the files and, where it is about tensors, the loading itself."""
    for look in (check_base_model, load_causal_lm)[: 1 + at_loading]:
        with pytest.raises(ModelError, match=pattern) as caught:
            look(str(folder))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"model.name={folder}: ")


TENSOR_FAULTS: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda tensors: tensors.pop(UP), rf"1 tensor is missing \({UP}\)"),
    (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name],
        r"11 tensors are missing \(model\.layers\.2\.input_layernorm\.weight and 10 more\)",
    ),
    (lambda tensors: tensors.update({"score.weight": torch.ones(2, 3)}), r"1 tensor is unknown .*\(score\.weight\)"),
    (
        lambda tensors: tensors.update({UP: tensors[UP][:47].clone()}),
        rf"1 tensor is of another shape \({UP}, \(47, 32\) for \(48, 32\)\)",
    ),
]


@pytest.mark.parametrize(("damage", "words"), TENSOR_FAULTS)
def test_a_missing_unexpected_or_misshaped_tensor_is_named(
    damage: Callable[[dict[str, torch.Tensor]], object], words: str, tmp_path: Path
) -> None:
    edit_weights(save_tiny_base(tmp_path / "base"), damage)
    refuses(tmp_path / "base", words)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "nemotron_h", "qwen3_next", "opt"])
def test_every_tensor_of_a_folder_that_transformers_wrote_has_its_place(family: str, tmp_path: Path) -> None:
    """Tied heads, names with another prefix, buffers that are not saved, experts stored one by one."""
    AutoModelForCausalLM.from_config(make_config(family)).save_pretrained(tmp_path)
    check_base_model(str(tmp_path))
    load_causal_lm(str(tmp_path))


def test_a_missing_expert_is_named_by_the_matrix_it_belongs_to(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(make_config("qwen3_next")).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(ModelError, match=r"1 tensor is missing \(model\.layers\.1\.mlp\.experts\.gate_up_proj\)"):
        check_base_model(str(tmp_path))


def test_tensors_that_the_model_itself_ignores_are_no_fault(tmp_path: Path) -> None:
    """Old Llama folders hold rotary frequencies of every layer, GPT-2's the causal mask, and names without prefix."""
    AutoModelForCausalLM.from_config(make_config("llama")).save_pretrained(tmp_path / "llama")
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    edit_weights(tmp_path / "llama", lambda tensors: tensors.update(old))
    AutoModelForCausalLM.from_config(make_config("gpt2")).save_pretrained(tmp_path / "gpt2")

    def publish(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors.update({f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for layer in range(4)})

    edit_weights(tmp_path / "gpt2", publish)
    for family in ("llama", "gpt2"):
        check_base_model(str(tmp_path / family))
        load_causal_lm(str(tmp_path / family))


def test_a_parameter_that_the_models_code_would_leave_random_in_silence_is_missing(tmp_path: Path) -> None:
    code = """
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM


class TidalConfig(Qwen3Config):
    model_type = "tidal"


class TidalForCausalLM(Qwen3ForCausalLM):
    config_class = TidalConfig
    _keys_to_ignore_on_load_missing = ["gauge"]

    def __init__(self, config):
        super().__init__(config)
        self.gauge = nn.Linear(4, 4)
"""
    save_base_with_code(tmp_path, code)
    for look in (check_base_model, load_causal_lm):
        with pytest.raises(ModelError, match=r"2 tensors are missing \(gauge\.bias and 1 more\)"):
            look(str(tmp_path), trust_remote_code=True)


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scramble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>404 not found</html>" * 9)


def share_bytes(folder: Path) -> None:
    """Two tensors at one place, which loads like any other if nobody looks."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    one, other = sorted(name for name in header if "layernorm" in name)[:2]
    header[one]["data_offsets"] = header[other]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def shard(folder: Path) -> None:
    model = load_causal_lm(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def lose_a_shard(folder: Path) -> None:
    shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def break_the_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def lose_the_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def keep_only(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_off, r"model\.safetensors has [\d,]+ bytes, its header promises [\d,]+; the file is half-written"),
        (scramble, r"model\.safetensors is not a whole safetensors file"),
        (share_bytes, r"model\.safetensors is not a whole safetensors file \(.*invalid offset"),
        (
            lose_a_shard,
            r"model-00002-of-\d+\.safetensors of model\.safetensors\.index\.json is missing \(1 of \d+ files",
        ),
        (break_the_index, r"model\.safetensors\.index\.json cannot be read \('weight_map'\)"),
        (lose_the_index, r"holds model-00001-of-.* but neither model\.safetensors nor model\.safetensors\.index\.json"),
        (keep_only(), r"no \*\.safetensors weights; it is not a whole checkpoint"),
        (keep_only("pytorch_model.bin"), r"only pytorch_model\.bin; other formats are not read: .*save_pretrained"),
        (keep_only("q4.gguf", "q8.gguf"), r"name the GGUF file itself, such as .*q4\.gguf"),
    ],
)
def test_weight_files_that_are_not_whole_are_one_line(
    damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    damage(save_tiny_base(tmp_path / "base"))
    refuses(tmp_path / "base", words)


def test_a_base_in_shards_is_read_by_its_index(tmp_path: Path) -> None:
    shard(save_tiny_base(tmp_path / "base"))
    check_base_model(str(tmp_path / "base"))


def test_a_peft_adapter_is_told_to_be_merged_beside_a_whole_model_too(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    with pytest.raises(ModelError, match=r"a PEFT adapter and no base model; merge it into its base"):
        check_base_model(str(adapter))
    save_tiny_base(adapter)
    refuses(adapter, "merge it into its base")


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
def test_a_quantised_checkpoint_is_told_to_be_dequantised(method: str, tmp_path: Path) -> None:
    edit_config(save_tiny_base(tmp_path), quantization_config={"quant_method": method, "bits": 4})
    refuses(tmp_path, rf"quantization_config \({method}\); .*de-quantise it", at_loading=False)


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int32, "I32")])
def test_float8_and_packed_weights_are_known_by_their_headers(dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    """The config says nothing of it."""
    edit_weights(save_tiny_base(tmp_path), lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    refuses(tmp_path, rf"{UP} is stored as {stored}; .*de-quantise it", at_loading=False)


def test_a_tied_config_over_a_file_with_another_head_names_both(tmp_path: Path) -> None:
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    same, other = save_tiny_base(tmp_path / "same"), save_tiny_base(tmp_path / "other")
    edit_weights(same, lambda tensors: tensors.update({head: tensors[embeddings].clone()}))
    check_base_model(str(same))
    edit_weights(other, lambda tensors: tensors.update({head: tensors[embeddings] + 1}))
    words = rf"config\.json ties {head} and {embeddings}, but model\.safetensors holds other values"
    refuses(other, words, at_loading=False)
    edit_config(other, tie_word_embeddings=False)
    check_base_model(str(other))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.T5Config(), r"model_type 't5'.* has no causal language model in transformers"),
        (transformers.ViTConfig(), r"model_type 'vit'.* has no causal language model"),
        (transformers.Qwen2_5_VLConfig(), r"model_type 'qwen2_5_vl'.* has no causal language model"),
        (transformers.BertConfig(architectures=["BertForMaskedLM"]), "is a BertForMaskedLM, which is no causal"),
        (transformers.BartConfig(architectures=["BartForConditionalGeneration"]), "is a BartForConditionalGeneration"),
        (
            transformers.LlamaConfig(architectures=["LlamaForSequenceClassification"]),
            "which is no causal language model",
        ),
    ],
)
def test_encoders_and_multimodal_models_are_refused_by_their_config(
    config: transformers.PretrainedConfig, words: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    refuses(tmp_path, words)


def test_a_model_type_that_transformers_does_not_know_is_one_line(tmp_path: Path) -> None:
    edit_config(save_tiny_base(tmp_path), model_type="qwen99")
    refuses(tmp_path, "model_type 'qwen99', Qwen3ForCausalLM is unknown to transformers")


def test_a_models_own_code_runs_only_when_it_is_allowed(tmp_path: Path) -> None:
    save_base_with_code(tmp_path)
    refuses(tmp_path, r"Python code that comes with it \(modeling_tidal\.TidalForCausalLM\).*trust_remote_code: true")
    check_base_model(str(tmp_path), trust_remote_code=True)
    assert type(load_causal_lm(str(tmp_path), trust_remote_code=True)).__name__ == "TidalForCausalLM"


def test_code_that_needs_an_absent_package_says_which(tmp_path: Path) -> None:
    code = "import nosuchpackage_anywhere\nfrom transformers import Qwen3Config, Qwen3ForCausalLM\n"
    save_base_with_code(tmp_path, code)
    for look in (check_base_model, load_causal_lm):
        with pytest.raises(ModelError, match=r"needs a package that is not installed .*nosuchpackage_anywhere"):
            look(str(tmp_path), trust_remote_code=True)
