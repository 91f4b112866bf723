"""Which parameters of a model a plan trains, by name, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from layerplan.errors import PlanError
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.freezing import apply_plan
from layerplan.models.meta import build_without_memory
from layerplan.models.ref import ModelRef
from layerplan.plan.exports import ParameterNames, Rule
from layerplan.plan.freeze_plan import FreezePlan, Modules
from layerplan.plan.module_names import name_module

_LINEAR = (nn.Linear, Conv1D)


def build_unloaded(model: ModelRef) -> nn.Module:
    """The model on the meta device; raises `ModelError` when there is none, or its own code is not allowed."""
    from transformers import AutoConfig

    model.check_consent()  # its errors are one line each
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config: Any = AutoConfig.from_pretrained(model.name, **options)
    return build_without_memory(config, name=model.name, trust_remote_code=model.trust_remote_code)


def name_parameters(model: nn.Module, plan: FreezePlan) -> ParameterNames:
    """Applies the plan to the model and names both sides.

    Raises:
        PlanError: When the plan does not fit the model, or changes during training, or trains a tied head apart from the
            embedding, which no choice of parameters can say.
    """
    if plan.phases:
        raise PlanError(f"freeze plan {plan.sha256[:12]}: changes during training; export the plan of one phase")
    if plan.tied == "head_only":
        raise PlanError(
            f"freeze plan {plan.sha256[:12]}: trains the tied matrix through the head alone, which names of parameters cannot say"
        )
    applied = apply_plan(model, plan)
    parts = find_decoder_parts(model)
    names = tuple(name for name, _ in model.named_parameters())
    linear = {path.split(".")[-1] for path, module in parts.layers.named_modules() if isinstance(module, _LINEAR)}
    return ParameterNames(
        names,
        applied.trainable,
        parts.layers_path,
        len(parts.layers),
        linear=tuple(sorted(linear)),
        stacked=tuple(_list_stacked(parts.layers, parts.layers_path)),
        tied=parts.embeddings_path if parts.is_tied else None,
    )


def find_selectors(model: nn.Module, rule: Rule) -> tuple[dict[str, Any], Modules]:
    """Fields of an explicit plan that trains what a rule picks, and the modules of layers that it picks in part.

    Raises:
        PlanError: When it picks a part of a module, or nothing in any layer: no plan says so.
    """
    parts = find_decoder_parts(model)
    names = {name for name, _ in model.named_parameters()}
    picked = {name for name in names if rule(name)}
    layers = [i for i in range(len(parts.layers)) if picked & _below(names, f"{parts.layers_path}.{i}")]
    modules: Modules = {}
    for layer in layers:
        prefix = f"{parts.layers_path}.{layer}"
        inside = _below(names, prefix)
        found = {name_module(name.removeprefix(f"{prefix}.")) for name in inside & picked}
        left = sorted(name for name in inside - picked if name_module(name.removeprefix(f"{prefix}.")) in found)
        if left:
            raise PlanError(
                f"layer {layer}: {left[0]} stays frozen beside others of its module that train; a plan trains whole modules"
            )
        if not inside <= picked:
            modules[layer] = tuple(sorted(found))
    if not layers:
        raise PlanError("nothing of a decoder layer trains, which a plan needs")
    ends = {
        "train_embeddings": parts.embeddings_path,
        "train_final_norm": parts.final_norm_path,
        "train_lm_head": parts.lm_head_path,
    }
    fields: dict[str, Any] = {"trainable": layers}
    for field, path in ends.items():
        fields[field] = bool(path) and bool(picked & _below(names, path))
    if parts.is_tied:
        fields["train_lm_head"] = fields["train_embeddings"]
    return fields, modules


def _list_stacked(layers: nn.Module, layers_path: str) -> Iterator[str]:
    for path, module in layers.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 2 and not isinstance(module, _ConvNd):
                yield f"{layers_path}.{path}.{name}"


def _below(names: set[str], path: str) -> set[str]:
    return {name for name in names if name.startswith(f"{path}.")}
