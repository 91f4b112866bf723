"""Any decoder-only model from transformers: found by structure, loaded from safetensors only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerplan.errors import ModelError
from layerplan.models.base_check import (
    explain_load_error,
    refuse_adapter,
    refuse_code_without_consent,
    refuse_other_tasks,
    refuse_unaccounted,
)
from layerplan.models.files import find_tokenizer_file, first_line, load_hf_config
from layerplan.models.tensor_map import TensorAccount, find_unfed, map_tensors
from layerplan.models.weight_files import read_stored_tensors


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder that plans and the tracer speak of, with their module paths."""

    embeddings: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    lm_head: nn.Module
    embeddings_path: str
    layers_path: str
    final_norm_path: str
    lm_head_path: str
    is_tied: bool


def find_decoder_parts(model: nn.Module) -> DecoderParts:
    """Finds the decoder layers, the norm after them, the input embedding and the output head.

    The layers are the `ModuleList` directly below the model's trunk whose length is `num_hidden_layers`; the final
    norm is the last parametrised direct child of that trunk which is neither the list nor an embedding, or else a norm
    without parameters.

    Raises:
        ModelError: Naming the class when one of the parts cannot be found.
    """
    name = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if head is None or embeddings is None:
        raise ModelError(f"{name}: has no input embedding or output head; a causal language model is expected")
    paths = {module: path for path, module in model.named_modules()}
    num_layers = _num_layers(model)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not lists:
        raise ModelError(f"{name}: no list of {num_layers} decoder layers found")
    layers_path, layers = min(lists, key=lambda item: item[0].count("."))
    trunk = model.get_submodule(layers_path.rpartition(".")[0])
    norm = _find_final_norm(trunk, layers, embeddings)
    if norm is None:
        raise ModelError(f"{name}: no norm after {layers_path} found")
    return DecoderParts(
        embeddings=embeddings,
        layers=layers,
        final_norm=norm,
        lm_head=head,
        embeddings_path=paths[embeddings],
        layers_path=layers_path,
        final_norm_path=paths[norm],
        lm_head_path=paths[head],
        is_tied=head.weight is embeddings.weight,
    )


def load_causal_lm(
    name: str, *, revision: str = "main", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> nn.Module:
    """Loads a causal language model in eval mode, from safetensors only, every tensor accounted for.

    Raises:
        ModelError: When config or weights are missing or of an unknown architecture, a tensor is missing, unexpected or
            of another shape, the code needs a package that is not installed, or the model's own code is not allowed.
    """
    from transformers import AutoModelForCausalLM

    values = load_hf_config(name, revision=revision)
    refuse_code_without_consent(name, values, trust_remote_code=trust_remote_code)
    refuse_other_tasks(name, values)
    folder = Path(name).expanduser()
    stored = None
    if folder.is_dir():
        refuse_adapter(name, folder)
        stored = read_stored_tensors(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else it raises without a name; what was mismatched is refused below
        )
    except Exception as error:  # a model's code can raise anything
        raise ModelError(explain_load_error(name, error)) from None
    unfed = () if stored is None else find_unfed(model, map_tensors(model, stored))
    refuse_unaccounted(name, model, TensorAccount.from_loading_info(info).with_missing(unfed))
    return model.eval()


def load_tokenizer(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """Loads the model's fast tokenizer; raises `ModelError` when there is none."""
    from transformers import AutoTokenizer

    find_tokenizer_file(name, revision=revision)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model.name={name}: the tokenizer cannot be loaded ({first_line(error)})") from None


def _num_layers(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise ModelError(f"{type(model).__name__}: its config has no num_hidden_layers")
    return num_layers


def _find_final_norm(trunk: nn.Module, layers: nn.ModuleList, embeddings: nn.Module) -> nn.Module | None:
    candidates = [
        child
        for child in trunk.children()
        if child is not layers and child is not embeddings and not isinstance(child, nn.Embedding)
    ]
    parametrised = [child for child in candidates if any(True for _ in child.parameters(recurse=False))]
    named = [child for child in parametrised if "norm" in type(child).__name__.lower()]
    without_weights = [child for child in candidates if "norm" in type(child).__name__.lower()]  # OLMo's first norm
    return (named or parametrised or without_weights or [None])[-1]
