"""Hybrids small enough to train in milliseconds, and the Qwen3 they take layers from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHForCausalLM

from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.hybrid import HybridConfig, HybridForCausalLM
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.recipe import Recipe, read_donor, resolve_recipe
from tests.model_folders import save_tiny_base
from tests.qwen3 import TINY_QWEN3

NEMOTRON: dict[str, Any] = {
    "intermediate_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
}
"""Sizes of a tiny Nemotron layer, with chunks short enough that rows of the tests have several."""
KINDS = ["nemotron", "nemotron", "qwen3", "qwen3"]


def make_config(kinds: list[str] | None = None, **changes: Any) -> HybridConfig:
    """Config of a tiny hybrid: two Nemotron layers below two of Qwen3 unless told otherwise."""
    kinds = kinds or KINDS
    sizes = {"nemotron": NEMOTRON} if "nemotron" in kinds else {}
    values = {name: value for name, value in TINY_QWEN3.items() if name not in ("model_type", "num_hidden_layers")}
    return HybridConfig(**{**values, "layer_kinds": kinds, "kind_sizes": sizes, **changes})


def build_hybrid(kinds: list[str] | None = None, **changes: Any) -> HybridForCausalLM:
    """The hybrid in float32 and eval mode, with the weights of seed 0, drawn wide enough that every layer matters."""
    torch.manual_seed(0)
    model = HybridForCausalLM(make_config(kinds, **{"initializer_range": 0.15, **changes})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_donor(folder: Path, **changes: Any) -> Path:
    """A Qwen3 of four layers as a folder with an empty tokenizer."""
    return save_tiny_base(folder, **{"num_hidden_layers": 4, "initializer_range": 0.15, **changes})


def save_nemotron_h(folder: Path, pattern: str = "M-M-*-M", **changes: Any) -> Path:
    """A NemotronH of the same width with blocks by its pattern (M Mamba2, - feed-forward, * attention, E experts)."""
    attention = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"n_routed_experts": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16}
    values = {"vocab_size": 30, "hidden_size": 32, "initializer_range": 0.15, **NEMOTRON, **attention, **experts}
    torch.manual_seed(1)
    model = NemotronHForCausalLM(NemotronHConfig(**{**values, "hybrid_override_pattern": pattern, **changes}))
    model.float().save_pretrained(folder)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    return folder


def resolve(folders: dict[str, Path], **spec: Any) -> Recipe:
    """The recipe of a stitch spec whose donors are these folders."""
    named = {name: {"name": str(folder)} for name, folder in folders.items()}
    donors = {name: read_donor(ModelRef(str(folder))) for name, folder in folders.items()}
    return resolve_recipe(StitchedModelConfig(donors=named, **spec), donors)


def load(folder: Path) -> Any:
    """Any model folder as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
