"""The sizes of a model, told by the model itself: built without memory, its parameters counted, its work measured.

Config names are not asked. A name stands for another thing in every other family, a default is whatever the class makes
of it, and what is not named at all, as a shared block or a per-layer embedding, is a parameter all the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from layerplan.errors import ModelError, first_line
from layerplan.models.causal_lm import DecoderParts, find_decoder_parts
from layerplan.models.estimated_work import estimate_work
from layerplan.models.files import list_changes, load_hf_config
from layerplan.models.freezing import find_reached_parameters
from layerplan.models.layer_work import LayerWork, is_expert_stack, measure_work
from layerplan.models.meta import build_without_memory
from layerplan.models.module_sizes import measure_modules
from layerplan.models.own_types import make_known
from layerplan.models.positions import positions_of
from layerplan.plan.model_shape import UNBOUNDED, LayerKind, LayerShape, ModelShape, SharedParams


def load_model_shape(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> ModelShape:
    """Returns the sizes of a folder's or hub id's model; reads its config and code, anew when they changed, no weight.

    Raises:
        ModelError: When the config is missing or no causal language model can be built from it.
    """
    return _load_shape(name, revision, trust_remote_code, list_changes(name, "config.json", "*.py"))


@lru_cache(maxsize=8)
def _load_shape(
    name: str, revision: str, trust_remote_code: bool, changes: tuple[tuple[str, int, int], ...]
) -> ModelShape:
    from transformers import AutoConfig

    load_hf_config(name, revision=revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"model.name={name}: its config cannot be read ({first_line(error)})") from None
    return measure_shape(build_without_memory(config, name=name, trust_remote_code=trust_remote_code))


def make_model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Returns the sizes of the model that transformers makes of a config's values.

    Raises:
        ModelError: When no causal language model can be built from it.
    """
    from transformers import AutoConfig

    name = str(config.get("model_type"))
    make_known(name)
    try:
        values = AutoConfig.for_model(**config)
    except Exception as error:
        raise ModelError(f"model_type={name}: the config cannot be read ({first_line(error)})") from None
    return measure_shape(build_without_memory(values, name=name))


def measure_shape(model: nn.Module) -> ModelShape:
    """Returns the sizes of a model on the meta device.

    Raises:
        ModelError: When the model's parts cannot be found, or its work neither be followed nor estimated.
    """
    parts = find_decoder_parts(model)
    unreached_params = _count_unreached(model, parts)  # by the model's own attention, which is about to be replaced
    try:
        work, is_exact = measure_work(model, parts), True
    except Exception:  # the model's own code, asking for values that are not there
        work, is_exact = _estimate(model, parts), False
    hidden_size = work.hidden_size
    # layers built alike share their work
    kinds = {id(done): (layer, done) for layer, done in zip(parts.layers, work.layers, strict=True)}
    shapes = {key: _layer_shape(layer, done, hidden_size) for key, (layer, done) in kinds.items()}
    layers = tuple(shapes[id(done)] for done in work.layers)
    attention = next((call for done in work.layers for call in done.attention), None)
    config = _text_config(model)
    heads = attention.num_heads if attention else getattr(config, "num_attention_heads", None) or 1
    shape = ModelShape(
        layers=layers,
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=attention.num_key_value_heads if attention else heads,
        head_dim=attention.query_head_dim if attention else max(1, hidden_size // heads),
        max_position_embeddings=positions_of(config) or UNBOUNDED,
        unreached_params=unreached_params,
        shared=find_shared(parts),
        is_exact=is_exact,
        **_count_ends(model, parts, work.outside_flops),
    )
    assert shape.total_params == sum(parameter.numel() for parameter in model.parameters()), (
        "every parameter has a place"
    )
    return shape


def _estimate(model: nn.Module, parts: DecoderParts) -> Any:
    try:
        return estimate_work(model, parts)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: cannot be run on token ids alone, and its config does not tell its work"
            f" ({first_line(error)})"
        ) from None


def find_shared(parts: DecoderParts) -> tuple[SharedParams, ...]:
    """Parameters that more than one layer has."""
    users: dict[int, set[int]] = defaultdict(set)
    sizes: dict[int, int] = {}
    for index, layer in enumerate(parts.layers):
        for parameter in layer.parameters():
            users[id(parameter)].add(index)
            sizes[id(parameter)] = parameter.numel()
    blocks: dict[tuple[int, ...], int] = defaultdict(int)
    for key, layers in users.items():
        if len(layers) > 1:
            blocks[tuple(sorted(layers))] += sizes[key]
    return tuple(SharedParams(layers=layers, params=params) for layers, params in sorted(blocks.items()))


def _count_ends(model: nn.Module, parts: DecoderParts, outside_flops: float) -> dict[str, Any]:
    """Embedding, head, final norm and whatever else there is, each parameter in the first of them that has it."""
    seen = {id(parameter) for parameter in parts.layers.parameters()}

    def count(module: nn.Module) -> int:
        fresh = {id(parameter): parameter.numel() for parameter in module.parameters() if id(parameter) not in seen}
        seen.update(fresh)
        return sum(fresh.values())

    embedding, head, norm = count(parts.embeddings), count(parts.lm_head), count(parts.final_norm)
    head_matrix = _matrix(parts.lm_head).numel()
    return {
        "vocab_size": len(_matrix(parts.embeddings)),
        "is_tied": parts.is_tied,
        "embedding_params": embedding,
        "head_params": head,
        "head_matrix_params": head_matrix,
        "final_norm_params": norm,
        "other_params": count(model),
        "other_matrix_params": max(0, round(outside_flops / 2) - head_matrix),
    }


def _count_unreached(model: nn.Module, parts: DecoderParts) -> int:
    """Parameters outside layers, embedding, norm and head that text does not reach; 0 where that cannot be asked."""
    owned = (parts.layers, parts.embeddings, parts.final_norm, parts.lm_head)
    known = {id(parameter) for module in owned for parameter in module.parameters()}
    others = {name: value.numel() for name, value in model.named_parameters() if id(value) not in known}
    if not others:
        return 0
    reached = find_reached_parameters(model, parts, computes=False)
    return sum(size for name, size in others.items() if name not in reached)


def _layer_shape(layer: nn.Module, work: LayerWork, hidden_size: int) -> LayerShape:
    matrices = round(work.matrix_flops / 2)
    kind = _kind(layer, work)
    calls = work.attention
    width = round(work.attention_flops_per_key / 2)
    queries = sum(call.num_heads * call.query_head_dim for call in calls) or width // 2
    keys_values = sum(call.num_key_value_heads * (call.query_head_dim + call.value_head_dim) for call in calls) or width
    attends = kind in ("decoder", "attention")
    mixer = _mixer_matrices(work) or hidden_size * (2 * queries + keys_values)
    rest = matrices - mixer if attends else matrices * (1 if kind == "mlp" else 2)
    modules, mixing_called = measure_modules(
        layer, work.events, routed_copies=work.routed_copies, matrix_params=matrices
    )
    return LayerShape(
        kind=kind,
        params=sum(parameter.numel() for parameter in layer.parameters()),
        matrix_params=matrices,
        idle_params=_idle_params(layer, work.routed_copies),
        first_matrix_params=round(work.first_matrix_flops / 2),
        attention_width=width,
        window=calls[0].rule.window if calls else None,
        is_chunked=bool(calls) and calls[0].rule.is_chunked,
        scan_flops=work.scan_flops,
        query_width=queries if attends else 0,
        key_value_width=keys_values if attends else 0,
        # a gated part has three matrices of this width
        feed_forward_width=0 if kind == "attention" else max(0, round(rest / (3 * hidden_size))),
        routed_copies=work.routed_copies,
        saved_bytes=work.saved_bytes,
        modules=modules,
        mixing_called=mixing_called,
    )


def _kind(layer: nn.Module, work: LayerWork) -> LayerKind:
    with_matrices = [
        child for child in layer.children() if any(parameter.dim() > 1 for parameter in child.parameters())
    ]
    has_feed_forward = len(with_matrices) > 1
    # a scan's own passing of states from chunk to chunk grows too, but little
    if work.attention or work.attention_flops_per_key > max(1.0, work.scan_flops / 16):
        return "decoder" if has_feed_forward else "attention"
    if work.scan_flops < 1.0 and not any(isinstance(module, nn.Conv1d) for module in layer.modules()):
        return "mlp"
    if has_feed_forward:
        return "recurrent_decoder"
    return "mamba2" if any("mamba2" in type(module).__name__.lower() for module in layer.modules()) else "recurrent"


def _mixer_matrices(work: LayerWork) -> int:
    modules = {id(call.module): call.module for call in work.attention}
    return sum(
        parameter.numel() for module in modules.values() for parameter in module.parameters() if parameter.dim() == 2
    )


def _idle_params(layer: nn.Module, active: int) -> int:
    if not active:
        return 0
    idle = 0
    for module in layer.modules():
        if is_expert_stack(module):
            own = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
            idle += sum(parameter.numel() // len(parameter) * max(0, len(parameter) - active) for parameter in own)
    return idle


def _matrix(module: nn.Module) -> torch.Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ModelError(f"{type(module).__name__}: has no weight of (vocabulary, width)")
    return weight


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
