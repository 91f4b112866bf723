"""A freeze plan applied to a model, and the proof that it was obeyed.

Order, because each step depends on the one before: load -> apply the plan -> shard -> build the optimizer over the
parameters that require gradients. Applying after sharding would leave FSDP units that mix both kinds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerplan.errors import PlanError, TrainingError
from layerplan.models.causal_lm import DecoderParts, find_decoder_parts
from layerplan.plan.freeze_plan import FreezePlan


@dataclass(frozen=True)
class AppliedPlan:
    """Parameter names on both sides of a plan; together they are all of the model's parameters."""

    trainable: frozenset[str]
    frozen: frozenset[str]


def apply_plan(model: nn.Module, plan: FreezePlan) -> AppliedPlan:
    """Sets `requires_grad` of every parameter as the plan says.

    Raises:
        PlanError: When the model has another layer count, or its embeddings are tied differently than the plan says.
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
    chosen = _trainable_ids(parts, plan, model)
    trainable: set[str] = set()
    frozen: set[str] = set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        (trainable if id(parameter) in chosen else frozen).add(name)
    if plan.tied == "head_only":
        parts.embeddings.register_forward_hook(_detach_output)
    return AppliedPlan(frozenset(trainable), frozenset(frozen))


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
    return {name: _hash_tensor(tensor) for name, tensor in tensors.items()}


def _trainable_ids(parts: DecoderParts, plan: FreezePlan, model: nn.Module) -> set[int]:
    if plan.trains_everything:
        return {id(parameter) for parameter in model.parameters()}
    modules: list[nn.Module] = [parts.layers[index] for index in plan.trainable_layers]
    if plan.train_final_norm:
        modules.append(parts.final_norm)
    if plan.train_embeddings or plan.tied == "head_only":
        modules.append(parts.embeddings)
    if plan.train_lm_head:
        modules.append(parts.lm_head)
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _detach_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.detach()


def _hash_tensor(tensor: Tensor) -> str:
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
