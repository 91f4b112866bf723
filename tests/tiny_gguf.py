"""Tiny GGUF files of several architectures, written with the `gguf` package as llama.cpp's converter lays models out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONTROL = ["<unk>", "<s>", "</s>"]
PIECES = ["▁", *"etaoinshr", "▁t", "▁a", "th", "▁th", "▁the"]
BYTE_LEVEL = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "he", "Ġt", "Ġth"]
MERGES = ["t h", "h e", "Ġ t", "Ġt h"]
SENTENCE_PIECES = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]


@dataclass(frozen=True)
class Family:
    """How one architecture is built and stored."""

    model_type: str
    arch: str
    tokenizer: str = "gpt2"
    changes: dict[str, Any] = field(default_factory=dict)
    permutes: bool = False
    """Whether query and key rows are interleaved, as llama.cpp's Llama does."""
    shifts_norms: bool = False
    """Whether norms are stored as w + 1, as Gemma's."""


FAMILIES = {
    "llama": Family("llama", "llama", "llama", {"tie_word_embeddings": False}, permutes=True),
    "mistral": Family("mistral", "llama", "llama", {"sliding_window": None}, permutes=True),
    "qwen2": Family("qwen2", "qwen2", changes={"tie_word_embeddings": True}),
    "qwen3": Family("qwen3", "qwen3", changes={"tie_word_embeddings": True, "head_dim": 128}),
    "gemma2": Family("gemma2", "gemma2", "llama", {"head_dim": 16}, shifts_norms=True),
    "gemma3": Family("gemma3_text", "gemma3", "llama", {"head_dim": 16}, shifts_norms=True),
    "phi3": Family("phi3", "phi3", "llama", {"pad_token_id": 0}),
    "qwen3_moe": Family(
        "qwen3_moe",
        "qwen3moe",
        changes={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 16},
    ),
}


def make_original(name: str, **changes: Any) -> Any:
    """The model before it was stored, with random weights."""
    family = FAMILIES[name]
    tokens = BYTE_LEVEL if family.tokenizer == "gpt2" else SENTENCE_PIECES
    config = CONFIG_MAPPING[family.model_type](**SIZES | {"vocab_size": len(tokens)} | family.changes | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def write_gguf(
    path: Path,
    model: Any,
    name: str,
    *,
    quantization: str = "Q8_0",
    arch: str | None = None,
    tokenizer: str | None = None,
    edit: Callable[[Any], object] = lambda writer: None,
) -> Path:
    """Stores the model; matrices in `quantization`, the rest in float32."""
    family = FAMILIES[name]
    writer = gguf.GGUFWriter(str(path), arch or family.arch)
    _add_facts(writer, model.config, name)
    _add_tokenizer(writer, family.tokenizer, tokenizer or family.tokenizer)
    edit(writer)
    kind = gguf.GGMLQuantizationType[quantization]
    for stored, values in iter_stored(model, name):
        is_matrix = values.ndim > 1 and "ffn_gate_inp" not in stored
        chosen = kind if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def iter_stored(model: Any, name: str) -> list[tuple[str, np.ndarray]]:
    """(GGUF name, float32 values) of every tensor, as llama.cpp's converter writes it."""
    family = FAMILIES[name]
    (arch,) = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.arch]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    is_tied = model.config.tie_word_embeddings
    found: list[tuple[str, np.ndarray]] = []
    for own, value in model.state_dict().items():
        if own == "lm_head.weight" and is_tied:
            continue
        values = value.float().numpy()
        if own.endswith("experts.gate_up_proj"):
            layer = own.split(".")[2]
            gate, up = np.split(values, 2, axis=1)
            found += [(f"blk.{layer}.ffn_gate_exps.weight", gate), (f"blk.{layer}.ffn_up_exps.weight", up)]
            continue
        if own.endswith("experts.down_proj"):
            found.append((f"blk.{own.split('.')[2]}.ffn_down_exps.weight", values))
            continue
        stored = names.get_name(own, try_suffixes=(".weight", ".bias"))
        assert stored is not None, own
        if family.permutes and ("q_proj" in own or "k_proj" in own):
            heads = model.config.num_attention_heads if "q_proj" in own else model.config.num_key_value_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if family.shifts_norms and own.endswith("norm.weight"):
            values = values + 1
        found.append((stored, np.ascontiguousarray(values)))
    return found


def dequantized(value: Tensor, quantization: str) -> Tensor:
    """What is left of a matrix after the quantisation, by the `gguf` package."""
    kind = gguf.GGMLQuantizationType[quantization]
    return torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(value.float().numpy(), kind), kind)))


def _add_facts(writer: Any, config: Any, name: str) -> None:
    writer.add_name(f"Tiny {name}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("rope_theta", 10_000.0))
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _add_tokenizer(writer: Any, vocabulary: str, said: str) -> None:
    writer.add_tokenizer_model(said)
    if vocabulary == "gpt2":
        writer.add_token_list(BYTE_LEVEL)
        writer.add_token_types([3] * len(CONTROL) + [1] * (len(BYTE_LEVEL) - len(CONTROL)))
        writer.add_token_merges(MERGES)
    else:
        writer.add_token_list(SENTENCE_PIECES)
        writer.add_token_scores([0.0] * (len(CONTROL) + 256) + [-float(place) for place in range(len(PIECES))])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
