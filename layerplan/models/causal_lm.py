"""Any decoder-only model from transformers: found by structure, loaded from safetensors only, named by its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerplan.errors import ModelError
from layerplan.plan.layer_profile import ModelIdentity


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
    norm is the last parametrised direct child of that trunk which is neither the list nor an embedding.

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


def load_hf_config(name: str, *, revision: str = "main") -> dict[str, Any]:
    """Reads `config.json` of a folder or a hub id, without loading weights.

    Raises:
        ModelError: When the folder or its config is missing or malformed, or the hub cannot be reached.
    """
    path = find_model_file(name, "config.json", revision=revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name={name}: {path} is not a readable config ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"model.name={name}: {path} has no model_type")
    return config


def find_model_file(name: str, filename: str, *, revision: str = "main") -> Path:
    """Returns the local path of one file of a model; downloads it when `name` is a hub id.

    Raises:
        ModelError: When the folder lacks the file or the hub cannot give it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / filename).is_file():
            raise ModelError(f"model.name={name}: the folder has no {filename}")
        return folder / filename
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"model.name={name}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model.name={name}: {filename} cannot be fetched from the hub ({first})") from None


def find_tokenizer_file(name: str, *, revision: str = "main") -> Path:
    """Returns the model's `tokenizer.json`; raises `ModelError` when there is none."""
    return find_model_file(name, "tokenizer.json", revision=revision)


def load_causal_lm(
    name: str, *, revision: str = "main", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> nn.Module:
    """Loads a causal language model in eval mode, from safetensors only.

    Raises:
        ModelError: When config or weights are missing or of an unknown architecture.
    """
    from transformers import AutoModelForCausalLM

    load_hf_config(name, revision=revision)
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(f"model.name={name}: the folder has no *.safetensors weights; other formats are not read")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model.name={name}: cannot be loaded ({first})") from None
    return model.eval()


def load_tokenizer(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """Loads the model's fast tokenizer; raises `ModelError` when there is none."""
    from transformers import AutoTokenizer

    find_tokenizer_file(name, revision=revision)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model.name={name}: the tokenizer cannot be loaded ({first})") from None


@lru_cache(maxsize=8)
def identify_model(name: str, *, revision: str = "main") -> ModelIdentity:
    """Returns who the model is: config facts, and for folders the hash of the weight files.

    Raises:
        ModelError: When config or weights are missing.
    """
    config = load_hf_config(name, revision=revision)
    folder = Path(name).expanduser()
    weights = hash_weight_files(folder) if folder.is_dir() else None
    num_layers = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(num_layers, int):
        raise ModelError(f"model.name={name}: config.json has no num_hidden_layers")
    return ModelIdentity(
        name=name_folder(folder) if folder.is_dir() else name,
        revision=revision,
        model_type=config["model_type"],
        num_layers=num_layers,
        weights_sha256=weights,
    )


def name_folder(folder: Path) -> str:
    """A model folder's name; an export of ours, `<run>/hf/step_X`, is named after its run: `<run>/step_X`."""
    folder = folder.resolve()
    is_export = folder.parent.name == "hf" and folder.name.startswith("step_")
    return f"{folder.parent.parent.name}/{folder.name}" if is_export else folder.name


def hash_weight_files(folder: Path) -> str:
    """Hash over the names and bytes of a folder's safetensors; raises `ModelError` when it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model.name={folder}: the folder has no *.safetensors weights")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


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
    return (named or parametrised or [None])[-1]
