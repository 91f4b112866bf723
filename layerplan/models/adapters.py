"""Low-rank adapters of PEFT's own making on the layers a plan trains, and the plan that follows: only adapters move.

`peft` is an optional package, imported here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.artifacts import write_json
from layerplan.config.finetune import LoraOptions
from layerplan.errors import ModelError, first_line
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.freezing import AppliedPlan
from layerplan.models.meta import hollow_values
from layerplan.models.ref import ModelRef
from layerplan.models.tensor_map import name_parameters
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.run_folder import ADAPTER_BASE_NAME

CONFIG_FILE = "adapter_config.json"
WRAPPING = "base_model.model."
"""What PEFT puts before a model's own names."""
_BESIDE = ".base_layer."
"""What PEFT puts into the name of a weight that an adapter stands beside."""
PROBED_TOKENS = 16
MERGED_ERROR = 1e-3
"""Largest difference of logits, as a share of the largest one, that rounding may make in float32."""


def check_peft() -> None:
    """Raises `ModelError` when PEFT is not installed."""
    _import_peft()


def inject_adapters(causal_lm: nn.Module, layers: Sequence[int], options: LoraOptions, *, seed: int) -> AppliedPlan:
    """Puts an adapter beside every linear map of some decoder layers; nothing else of the model trains from then on.

    Args:
        causal_lm: The model; changed in place.
        layers: Indices of the decoder layers.
        options: Rank, scale and dropout.
        seed: Of the adapters' first values, the same on every rank.

    Raises:
        ModelError: When PEFT is missing or refuses, or a layer has no linear map.
    """
    peft = _import_peft()
    config = make_lora_config(causal_lm, layers, options)
    torch.manual_seed(seed)
    try:
        with hollow_values(causal_lm):  # adapters take device and dtype of what they stand beside
            peft.inject_adapter_in_model(config, causal_lm)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{type(causal_lm).__name__}: PEFT cannot adapt it ({error})") from None
    trainable: set[str] = set()
    frozen: set[str] = set()
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_("lora_" in name)
        (trainable if parameter.requires_grad else frozen).add(name)
    return AppliedPlan(frozenset(trainable), frozenset(frozen))


def count_adapter_params(causal_lm: nn.Module, layers: Iterable[int], options: LoraOptions) -> int:
    """Parameters of the adapters beside every linear map of some decoder layers: rank x (inputs + outputs) of each.

    Raises:
        ModelError: When a layer has no linear map.
    """
    modules = dict(causal_lm.named_modules())
    found = [modules[name] for name in list_adapted(causal_lm, layers)]
    return options.rank * sum(module.in_features + module.out_features for module in found)


def name_in_base(name: str) -> str:
    """A parameter's name before adapters were put into the model."""
    return name.replace(_BESIDE, ".")


def make_lora_config(causal_lm: nn.Module, layers: Iterable[int], options: LoraOptions) -> Any:
    """PEFT's config for every linear map of some decoder layers, by their full names."""
    targets = list_adapted(causal_lm, layers)
    return _import_peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        bias="none",
    )


def list_adapted(causal_lm: nn.Module, layers: Iterable[int]) -> list[str]:
    """Names of the linear maps of some decoder layers; raises `ModelError` when there is none."""
    parts = find_decoder_parts(causal_lm)
    prefixes = tuple(f"{parts.layers_path}.{index}." for index in layers)
    targets = [
        name
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes)
    ]
    if not targets:
        raise ModelError(
            f"{type(causal_lm).__name__}: its layers have no linear map that an adapter could stand beside"
        )
    return targets


@torch.no_grad()
def wrap_adapters(
    causal_lm: nn.Module, layers: Sequence[int], options: LoraOptions, tensors: dict[str, Tensor] | None = None
) -> Any:
    """The model as PEFT's own class, its adapters at the given values, named as in the model itself."""
    wrapped = _import_peft().get_peft_model(causal_lm, make_lora_config(causal_lm, layers, options))
    if tensors is not None:
        named = {name.removeprefix(WRAPPING): value for name, value in wrapped.named_parameters()}
        for name, value in tensors.items():
            named[name].copy_(value)
    return wrapped


def list_adapter_tensors(wrapped: Any) -> dict[str, Tensor]:
    """Adapters of a wrapped model by the names they have in the model itself."""
    return {name.removeprefix(WRAPPING): value for name, value in wrapped.named_parameters() if "lora_" in name}


def save_adapter(wrapped: Any, folder: Path, base: ModelRef, identity: ModelIdentity) -> None:
    """Writes PEFT's own folder, and beside it which base the adapter belongs to."""
    wrapped.peft_config["default"].base_model_name_or_path = base.name
    wrapped.save_pretrained(str(folder))
    write_json(folder / ADAPTER_BASE_NAME, identity.model_dump(mode="json"))


def check_adapter(folder: Path, base: ModelRef) -> None:
    """Raises `ModelError` for a folder that is no adapter of PEFT, or one that was trained on another base."""
    if not (folder / CONFIG_FILE).exists():
        raise ModelError(f"{folder}: no {CONFIG_FILE}; a folder in PEFT's format is expected")
    if not (folder / ADAPTER_BASE_NAME).exists():
        return
    made_for = ModelIdentity.model_validate_json((folder / ADAPTER_BASE_NAME).read_text(encoding="utf-8"))
    given = base.identity()
    # versions that did not hash weights of the hub told none
    told = (made_for.weights_sha256 or given.weights_sha256, made_for.model_type, made_for.num_layers)
    if told != (given.weights_sha256, given.model_type, given.num_layers):
        raise ModelError(
            f"{folder}: the adapter belongs to {made_for.name} (weights {str(made_for.weights_sha256)[:12]}), not to"
            f" {base} (weights {str(given.weights_sha256)[:12]})"
        )


def read_adapter(folder: Path, base: ModelRef) -> Any:
    """The base with an adapter, as PEFT's own class; raises `ModelError` when the two do not fit together."""
    peft = _import_peft()
    try:
        return peft.PeftModel.from_pretrained(base.load(), str(folder))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: does not fit {base} ({first_line(error)})") from None


@torch.no_grad()
def compute_merged(wrapped: Any, base: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """What merging changes of the base, float32, by the base's names: matrices, biases, and modules that trained whole.

    PEFT merges, whatever the kind of adapter. Not all of it is a sum that can be stored: a tied matrix cannot change on
    one side alone. So the merged model has to give the logits that the adapted one gave.

    Args:
        wrapped: The base with the adapter, in float32; merged in place.
        base: Of the base's class, on the meta device or not; says what is tied.
        read: From a parameter's name to its values in the base.

    Raises:
        ModelError: When the adapter is of a kind that cannot be merged, or the merged model would be another.
    """
    kind = str(getattr(wrapped.peft_config["default"].peft_type, "value", "adapter"))
    device, num_words = next(wrapped.parameters()).device, base.get_input_embeddings().num_embeddings
    ids = torch.linspace(0, num_words - 1, PROBED_TOKENS, device=device).long()[None]
    adapted = wrapped(ids).logits.float()
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{kind}: PEFT cannot merge this adapter into its base ({first_line(error)})") from None
    values, names = merged.state_dict(), name_parameters(base)
    if missing := names.keys() - values.keys():
        raise ModelError(f"{kind}: the merged model has no {min(missing)}, which its base has")
    for name, first in names.items():
        if not torch.equal(values[name], values[first]):
            raise ModelError(
                f"{kind}: leaves {name} other values than {first}, and the base has one tensor for both (tied)"
            )
    found = merged(ids).logits.float()
    if found.shape != adapted.shape or not torch.allclose(
        found, adapted, atol=MERGED_ERROR * float(adapted.abs().max())
    ):
        raise ModelError(
            f"{kind}: merged into its base, the model gives other logits than with the adapter beside it; an adapter on"
            " the embeddings or the head of a base that ties them cannot be merged"
        )
    parameters = dict.fromkeys(name for name, _ in base.named_parameters())
    return {
        name: values[name].float() for name in parameters if not torch.equal(values[name].float(), read(name).float())
    }


def find_adapted(wrapped: Any) -> dict[str, Any]:
    """Modules that have an adapter, by the names their matrices have in the base."""
    return {
        name.removeprefix(WRAPPING) + ".weight": module
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }


@torch.no_grad()
def compute_delta(module: Any) -> Tensor:
    """What an adapter adds to its matrix, float32."""
    delta: Tensor = module.get_delta_weight("default").float()
    return delta


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"finetune.update=lora: needs the package peft ({error}); install it, or use update: full"
        ) from None
    return peft
