"""Positions that a GGUF file stretches, and what else of a model a file has and its config would leave out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerplan.errors import ModelError
from layerplan.models.causal_lm import load_causal_lm
from layerplan.models.gguf import convert_gguf
from layerplan.models.gguf_file import open_gguf
from layerplan.models.gguf_tensors import read_facts
from tests.tiny_gguf import gguf, make_original, write_gguf

IDS = torch.arange(3, 60)[None]
LONG, SHORT = [4.0 + place for place in range(8)], [1.0 + place / 8 for place in range(8)]
Edit = Callable[[Any], object]


def write_scaling(kind: Any, factor: float, original: int = 0) -> Edit:
    """As llama.cpp's converter says it."""

    def edit(writer: Any) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(factor)
        if original:
            writer.add_rope_scaling_orig_ctx_len(original)

    return edit


def write_longrope(writer: Any) -> None:
    writer.add_rope_dimension_count(16)
    writer.add_rope_scaling_orig_ctx_len(32)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(128 / 32) / math.log(32)))
    add_tensor("rope_factors_long.weight", LONG)(writer)
    add_tensor("rope_factors_short.weight", SHORT)(writer)


def add_tensor(name: str, values: Any) -> Edit:
    return lambda writer: writer.add_tensor(name, np.asarray(values, dtype=np.float32))


def list_llama3_divisors(factor: float, theta: float, width: int) -> list[float]:
    """What llama.cpp's converter writes to `rope_freqs.weight` (`convert_hf_to_gguf.py`, `LlamaModel`)."""
    divisors = []
    for place in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (place / width)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(factor)
        else:
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "long_factor": LONG, "short_factor": SHORT}


@pytest.mark.parametrize(
    ("name", "changes", "edit"),
    [
        ("llama", {"rope_parameters": LINEAR}, write_scaling(gguf.RopeScalingType.LINEAR, 4.0)),
        ("llama", {"rope_parameters": LINEAR}, lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)),
        ("llama", {}, write_scaling(gguf.RopeScalingType.NONE, 4.0)),
        ("llama", {}, add_tensor("rope_freqs.weight", np.ones(8))),
        ("qwen2", {"rope_parameters": YARN}, write_scaling(gguf.RopeScalingType.YARN, 4.0, 32)),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, write_longrope),
        ("phi3", {"partial_rotary_factor": 0.5}, lambda writer: writer.add_rope_dimension_count(8)),
        (
            "gemma2",
            {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "sliding_window": 16},
            lambda writer: (writer.add_attn_logit_softcapping(20.0), writer.add_final_logit_softcapping(10.0)),
        ),
        ("phi3", {"sliding_window": 16}, lambda writer: writer.add_sliding_window(16)),
    ],
)
def test_the_model_computes_what_the_stored_one_did(
    name: str, changes: dict[str, Any], edit: Edit, tmp_path: Path
) -> None:
    model = make_original(name, **changes)
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, name, quantization="F32", edit=edit), tmp_path / "made")
    with torch.inference_mode():
        found, wanted = load_causal_lm(str(tmp_path / "made"))(IDS).logits, model(IDS).logits
    assert (found - wanted).abs().max() < 1e-4


def test_gemma_3_stretches_the_layers_that_see_everything(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        make_original("gemma3"),
        "gemma3",
        edit=write_scaling(gguf.RopeScalingType.LINEAR, 8.0),
    )
    found = read_facts(open_gguf(path)).config.rope_parameters
    assert found["full_attention"]["rope_type"] == "linear" and found["full_attention"]["factor"] == 8.0
    assert found["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize("factor", [8.0, 32.0])  # Llama 3.1 and 3.2
def test_llama_3_divides_its_frequencies_as_the_file_does(factor: float, tmp_path: Path) -> None:
    model = make_original("llama", head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    divisors = list_llama3_divisors(factor, 500_000.0, 64)
    write_gguf(tmp_path / "tiny.gguf", model, "llama", edit=add_tensor("rope_freqs.weight", divisors))
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "made")
    made: Any = load_causal_lm(str(tmp_path / "made"))
    assert made.config.rope_parameters["factor"] == factor
    found, plain = made.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    assert torch.allclose(found, plain / torch.tensor(divisors), rtol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-1)


@pytest.mark.parametrize(
    ("name", "changes", "edit", "said"),
    [
        ("llama", {}, add_tensor("rope_freqs.weight", np.linspace(1, 8, 8)), r"has rope_freqs\.weight of its own"),
        (
            "llama",
            {},
            write_scaling(gguf.RopeScalingType.YARN, 4.0),
            r"has rope\.scaling\.type='yarn' with factor, type",
        ),
        (
            "llama",
            {"attention_bias": True},
            None,
            r"its tensor blk\.0\.attn_q\.bias has no place in a LlamaForCausalLM",
        ),
        (
            "llama",
            {},
            add_tensor("blk.2.attn_norm.weight", np.ones(64)),
            r"its tensor blk\.2\.attn_norm\.weight has no",
        ),
    ],
)
def test_what_would_be_left_out_is_refused(
    name: str, changes: dict[str, Any], edit: Edit | None, said: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "a.gguf", make_original(name, **changes), name, edit=edit or (lambda writer: None))
    with pytest.raises(ModelError, match=said):
        convert_gguf(path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_its_scores_by_the_width_per_head(name: str, layers: int, tmp_path: Path) -> None:
    for count, wanted in ((layers, 64 // 4), (2, 256)):
        path = write_gguf(tmp_path / f"{count}.gguf", make_original(name, num_hidden_layers=count), name)
        assert read_facts(open_gguf(path)).config.query_pre_attn_scalar == wanted


def test_frequencies_that_old_files_repeat_are_passed_over(tmp_path: Path) -> None:
    edit = add_tensor("blk.0.attn_rot_embd", np.ones(8))
    write_gguf(tmp_path / "tiny.gguf", make_original("llama"), "llama", edit=edit)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "made")
    load_causal_lm(str(tmp_path / "made"))
