"""Model folders for tests: tiny ones written by transformers, and one whose architecture is its own code file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from tests.qwen3 import build_tiny_qwen3

OWN_CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model


class TidalConfig(Qwen3Config):
    model_type = "tidal"


class TidalModel(Qwen3Model):
    config_class = TidalConfig


class TidalForCausalLM(Qwen3ForCausalLM):
    config_class = TidalConfig
"""


def save_tiny_base(folder: Path, **changes: Any) -> Path:
    """A tiny Qwen3 as a folder with an empty tokenizer; `changes` go into its config."""
    build_tiny_qwen3(**changes).save_pretrained(folder)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    return folder


def save_base_with_code(folder: Path, code: str = OWN_CODE) -> Path:
    """The same weights under a model type that transformers does not know, with the file that defines it."""
    return give_code(save_tiny_base(folder), code)


def give_code(folder: Path, code: str = OWN_CODE) -> Path:
    """Turns a Qwen3 folder into one whose architecture is the code beside it."""
    (folder / "modeling_tidal.py").write_text(code)
    classes = {"AutoConfig": "TidalConfig", "AutoModel": "TidalModel", "AutoModelForCausalLM": "TidalForCausalLM"}
    auto_map = {auto: f"modeling_tidal.{name}" for auto, name in classes.items()}
    edit_config(folder, model_type="tidal", architectures=["TidalForCausalLM"], auto_map=auto_map)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Reads `model.safetensors`, edits its tensors in place, and writes it again."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
