"""A freeze plan applied to a model, and the proof that it was obeyed.

Order, because each step depends on the one before: load -> apply the plan -> shard -> build the optimizer over the
parameters that require gradients. Applying after sharding would leave FSDP units that mix both kinds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.errors import PlanError, TrainingError
from layerplan.models.causal_lm import FOREIGN_ERRORS, DecoderParts, accepted_options, find_decoder_parts
from layerplan.models.meta import hollow_values
from layerplan.models.positions import positions_of
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.module_names import name_module

PROBE_TOKENS = (8, 256)
"""Tokens run to see what they reach; more only where few do not reach everything, as keys compressed 128 to 1."""


@dataclass(frozen=True)
class AppliedPlan:
    """Parameter names on both sides of a plan; together they are all of the model's parameters."""

    trainable: frozenset[str]
    frozen: frozenset[str]
    idle: frozenset[str] = frozenset()
    """Those of the frozen that the plan would train, if text moved them: a vision tower's, for one."""


def apply_plan(model: nn.Module, plan: FreezePlan) -> AppliedPlan:
    """Sets `requires_grad` of every parameter as the plan says.

    A parameter that no logit of a text depends on can get no gradient and stays frozen under every plan.

    Raises:
        PlanError: When the model has another layer count, its embeddings are tied differently than the plan says, or a
            parameter belongs to a layer that trains and to one that does not.
    """
    parts = find_decoder_parts(model)
    if len(parts.layers) != plan.model.num_layers:
        raise PlanError(
            f"freeze plan {plan.sha256[:12]}: made for {plan.model.num_layers} layers, the model has {len(parts.layers)}"
        )
    if parts.is_tied != (plan.tied != "untied"):
        raise PlanError(
            f"freeze plan {plan.sha256[:12]}: tied={plan.tied!r}, but the model's embeddings are"
            f" {'tied' if parts.is_tied else 'not tied'}"
        )
    _check_sharing(parts, plan)
    wanted = _trainable_ids(parts, plan, model)
    reached = find_reached_parameters(model, parts)
    trainable: set[str] = set()
    frozen: set[str] = set()
    idle: set[str] = set()
    for name, parameter in model.named_parameters():
        is_trained = id(parameter) in wanted and name in reached
        parameter.requires_grad_(is_trained)
        (trainable if is_trained else frozen).add(name)
        if id(parameter) in wanted and not is_trained:
            idle.add(name)
    if plan.tied == "head_only":
        parts.embeddings.register_forward_hook(_detach_output)
    return AppliedPlan(frozenset(trainable), frozenset(frozen), frozenset(idle))


def find_reached_parameters(model: nn.Module, parts: DecoderParts, *, computes: bool = True) -> frozenset[str]:
    """Names of the parameters that the logits of a text depend on, read from autograd's graph of a few tokens.

    An expert that these tokens were not routed to counts as reached when another of its list is. All do where the model
    does not run on tokens alone. A model on the meta device is run there, and where its code asks for values, on a CPU
    with numbers that mean nothing, unless nothing may be computed.
    """
    everything = frozenset(name for name, _ in model.named_parameters())
    reached = _probe(model, parts, everything)
    if reached is None and computes and next(model.parameters()).is_meta:
        with hollow_values(model):
            reached = _probe(model, parts, everything)
    return everything if reached is None else reached


def check_gradient_coverage(model: nn.Module, applied: AppliedPlan) -> None:
    """Raises `TrainingError` unless exactly the planned parameters have a gradient."""
    with_gradient = {hf_name(name) for name, value in model.named_parameters() if value.grad is not None}
    missing = sorted(applied.trainable - with_gradient)
    surplus = sorted(with_gradient - applied.trainable)
    if missing or surplus:
        raise TrainingError(
            "gradient coverage differs from the plan:"
            f" {len(missing)} trainable parameters have no gradient ({_shown(missing)}),"
            f" {len(surplus)} frozen parameters have one ({_shown(surplus)})"
        )


def compute_tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hashes dtype, shape and bytes of each tensor; equal bytes give equal hashes on every device."""
    return {name: hash_tensor(tensor) for name, tensor in tensors.items()}


def _trainable_ids(parts: DecoderParts, plan: FreezePlan, model: nn.Module) -> set[int]:
    if plan.trains_everything:
        return {id(parameter) for parameter in model.parameters()}
    modules: list[nn.Module] = []
    if plan.train_final_norm:
        modules.append(parts.final_norm)
    if plan.train_embeddings or plan.tied == "head_only":
        modules.append(parts.embeddings)
    if plan.train_lm_head:
        modules.append(parts.lm_head)
    return _list_layer_ids(parts, plan) | {id(parameter) for module in modules for parameter in module.parameters()}


def _list_layer_ids(parts: DecoderParts, plan: FreezePlan) -> set[int]:
    """Parameters of decoder layers that train."""
    found: set[int] = set()
    for index in plan.trainable_layers:
        named = dict(parts.layers[index].named_parameters(remove_duplicate=False))
        _check_modules(plan, index, named)
        found |= {id(parameter) for name, parameter in named.items() if plan.trains(index, name)}
    return found


def _check_modules(plan: FreezePlan, layer: int, names: Iterable[str]) -> None:
    there = sorted({name_module(name) for name in names})
    for module in plan.trainable_modules.get(layer, ()):
        if module not in there:
            raise PlanError(
                f"freeze plan {plan.sha256[:12]}: layer {layer} has no module {module!r}; they are {', '.join(there)}"
            )


def _check_sharing(parts: DecoderParts, plan: FreezePlan) -> None:
    """Refuses a plan that trains one of the layers a parameter is shared by and freezes another."""
    if plan.trains_everything:
        return
    owners: dict[int, dict[int, bool]] = {}
    for index, layer in enumerate(parts.layers):
        for name, parameter in layer.named_parameters():
            owners.setdefault(id(parameter), {})[index] = plan.trains(index, name)
    for layers in owners.values():
        if len(set(layers.values())) > 1:
            raise PlanError(
                f"freeze plan {plan.sha256[:12]}: layers {', '.join(map(str, layers))} of the model share parameters, so"
                " they train together or not at all"
            )


def _reached_by(model: nn.Module, parts: DecoderParts, num_tokens: int) -> frozenset[str]:
    config: Any = model.config
    ids = _collect_variables(_run_tokens(model, min(num_tokens, positions_of(config.get_text_config()) or num_tokens)))
    named = dict(model.named_parameters())
    kinds = {_without_list_indices(name, parts) for name, value in named.items() if id(value) in ids}
    return frozenset(name for name in named if _without_list_indices(name, parts) in kinds)


def _run_tokens(model: nn.Module, num_tokens: int) -> Tensor:
    """Logits of some tokens, with every parameter asking for a gradient; the model is left as it was found."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point()}
    was_training = model.training
    model.eval()
    try:
        for parameter in asked:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            ids = torch.arange(num_tokens, device=next(iter(asked)).device)[None] % 64
            logits: Tensor = model(input_ids=ids, **accepted_options(model, use_cache=False)).logits
            return logits
    finally:
        model.train(was_training)
        for parameter, flag in asked.items():
            parameter.requires_grad_(flag)


def _collect_variables(output: Tensor) -> set[int]:
    """Ids of the leaves that a tensor's graph ends in."""
    found: set[int] = set()
    seen: set[Any] = set()
    pending: list[Any] = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending.extend(following for following, _ in node.next_functions)
    return found


def _probe(model: nn.Module, parts: DecoderParts, everything: frozenset[str]) -> frozenset[str] | None:
    """What few tokens reach, or more where those do not reach everything; None where the model does not run on them."""
    reached: frozenset[str] = frozenset()
    for num_tokens in PROBE_TOKENS:
        try:
            reached |= _reached_by(model, parts, num_tokens)
        except FOREIGN_ERRORS:
            return None
        if reached == everything:
            break
    return reached


def _without_list_indices(name: str, parts: DecoderParts) -> str:
    """A parameter's name with the indices inside its layer taken out; a layer keeps its own."""
    prefix = parts.layers_path + "."
    if not name.startswith(prefix):
        return re.sub(r"\.\d+\.", ".*.", name)
    index, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{index}." + re.sub(r"(^|\.)\d+\.", r"\1*.", rest)


def _detach_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.detach()


def hash_tensor(tensor: Tensor) -> str:
    """Hash of dtype, shape and bytes; equal bytes give equal hashes on every device."""
    plain = tensor.detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _shown(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "") if names else "none"


def hf_name(name: str) -> str:
    """The parameter's Hugging Face name, without the prefix wrappers put before it."""
    return name.removeprefix("causal_lm.")
