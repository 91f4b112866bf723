"""Any decoder-only model from transformers: found by structure, loaded from safetensors only."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerplan.errors import ModelError, first_line
from layerplan.models.base_check import (
    refuse_adapter,
    refuse_code_without_consent,
    refuse_other_tasks,
    refuse_unaccounted,
)
from layerplan.models.files import find_tokenizer_file, load_hf_config
from layerplan.models.meta import ValuesAreTrue, explain_load_error, hollow_values
from layerplan.models.tensor_map import TensorAccount, find_unfed, map_tensors
from layerplan.models.weight_files import read_stored_tensors
from layerplan.models.written_tokenizer import follow_file

FOREIGN_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What a model's own code raises when it is used as the text decoder it is not."""


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder that plans and the tracer speak of, with their module paths."""

    embeddings: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    """An identity outside the model, with an empty path, when no norm follows the last layer."""
    lm_head: nn.Module
    embeddings_path: str
    layers_path: str
    final_norm_path: str
    lm_head_path: str
    trunk_path: str
    """The model's own child that holds the layers: its output is what the head's code reads."""
    is_tied: bool


def find_decoder_parts(model: nn.Module) -> DecoderParts:
    """Finds the decoder layers, the norm after them, the input embedding and the output head.

    The layers are the list of modules nearest to the input embedding that has the length the config gives; the final norm
    is the last norm of the residual width beside that list, or beside what holds it. Vision and audio towers have lists
    of their own, farther from the embedding.

    Raises:
        ModelError: Naming the class, what was found and what is wanted, when one of the parts is missing or ambiguous.
    """
    head, embeddings = _find_ends(model)
    paths = {module: path for path, module in model.named_modules()}
    layers_path, layers = _find_layers(model, paths[embeddings])
    norm_path = _find_final_norm(model, layers_path, width=head.weight.shape[-1])
    return DecoderParts(
        embeddings=embeddings,
        layers=layers,
        final_norm=model.get_submodule(norm_path) if norm_path else nn.Identity(),
        lm_head=head,
        embeddings_path=paths[embeddings],
        layers_path=layers_path,
        final_norm_path=norm_path,
        lm_head_path=paths[head],
        trunk_path=layers_path.partition(".")[0],
        is_tied=head.weight is embeddings.weight,
    )


def caps_scores(model: nn.Module) -> bool:
    """Whether its attention caps scores, which transformers' default attention drops without a word."""
    return bool(getattr(model.config.get_text_config(), "attn_logit_softcapping", None))


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
    """Loads the model's fast tokenizer, which splits text as its file says; raises `ModelError` when there is none."""
    from transformers import AutoTokenizer

    file = find_tokenizer_file(name, revision=revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        return follow_file(tokenizer, file, pretrained_model_name_or_path=name, **options)
    except Exception as error:  # a class's code over a file of any shape
        raise ModelError(f"model.name={name}: the tokenizer cannot be loaded ({first_line(error)})") from None


def accepted_options(module: nn.Module, **options: Any) -> dict[str, Any]:
    """Those of the options that a module's forward pass has a parameter for."""
    names = inspect.signature(module.forward).parameters
    is_open = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in names.values())
    return {name: value for name, value in options.items() if is_open or name in names}


def _find_ends(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The output head and the input embedding, both with a matrix of their own."""
    name, inside = type(model).__name__, set(model.modules())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for role, module in (("output head", head), ("input embedding", embeddings)):
        weight = getattr(module, "weight", None)
        if module not in inside or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            kind = "none" if module is None else type(module).__name__
            raise ModelError(f"{name}: its {role} is {kind}; a causal language model with one matrix there is expected")
    assert head is not None and embeddings is not None, "both were just looked at"
    return head, embeddings


def _find_layers(model: nn.Module, embeddings_path: str) -> tuple[str, nn.ModuleList]:
    name, counts = type(model).__name__, _layer_counts(model)
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_has_parameters, module))
    }
    outermost = [path for path in lists if not any(path.startswith(other + ".") for other in lists)]
    fitting = [path for path in outermost if len(lists[path]) in counts.values()]
    nearest = min((_distance(path, embeddings_path) for path in fitting), default=0)
    found = [path for path in fitting if _distance(path, embeddings_path) == nearest]
    if len(found) != 1:
        said = " and ".join(f"{key}={value}" for key, value in counts.items()) or "no num_hidden_layers"
        seen = ", ".join(f"{path} ({len(lists[path])})" for path in outermost) or "none"
        raise ModelError(
            f"{name}: one list of decoder layers is expected, of the length its config gives; the config has {said},"
            f" the lists of modules are {seen}"
        )
    return found[0], lists[found[0]]


def _layer_counts(model: nn.Module) -> dict[str, int]:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    values = {name: getattr(text, name, None) for name in ("num_hidden_layers", "num_layers")}
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _find_final_norm(model: nn.Module, layers_path: str, *, width: int) -> str:
    """Path of the last norm beside the layers, or beside what holds them inside the trunk; empty when there is none."""
    path = layers_path
    while "." in path:
        path = path.rpartition(".")[0]
        norms = [
            f"{path}.{child}"
            for child, module in model.get_submodule(path).named_children()
            if "norm" in type(module).__name__.lower() and _fits(module, width)
        ]
        # BART's `layernorm_embedding` stands before the layers, LFM2's `embedding_norm` after them
        unclear = {norm for norm in norms if "emb" in norm.rpartition(".")[2]}
        norms = [norm for norm in norms if norm not in unclear or _runs_after(model, norm, layers_path)]
        if norms:
            return norms[-1]
    return ""


def _runs_after(model: nn.Module, norm_path: str, layers_path: str) -> bool:
    """Whether a norm is called after the last layer, seen by running the model on one token, on the meta device if it can."""
    is_meta = next(model.parameters()).is_meta
    with ValuesAreTrue() if is_meta else nullcontext():
        calls = _list_calls(model, norm_path, layers_path)
    if calls is None and is_meta:
        with hollow_values(model):
            calls = _list_calls(model, norm_path, layers_path)
    return calls is not None and layers_path in calls and norm_path in calls[calls.index(layers_path) :]


@torch.no_grad()
def _list_calls(model: nn.Module, norm_path: str, layers_path: str) -> list[str] | None:
    """Paths in the order of their calls; None where the model does not run on tokens alone."""
    calls: list[str] = []
    watched = {norm_path: model.get_submodule(norm_path), layers_path: model.get_submodule(layers_path)[-1]}
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: calls.append(path)) for path, module in watched.items()
    ]
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    try:
        model(input_ids=ids, **accepted_options(model, use_cache=False))
    except FOREIGN_ERRORS:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _fits(norm: nn.Module, width: int) -> bool:
    """Whether a norm is of the residual stream: of its width, or without weights, as OLMo's first."""
    return all(parameter.shape[-1] == width for parameter in norm.parameters())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _distance(path: str, other: str) -> int:
    """Steps from one module to the other in the tree of modules."""
    left, right = path.split("."), other.split(".")
    common = next((depth for depth, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), 0)
    return len(left) + len(right) - 2 * common
