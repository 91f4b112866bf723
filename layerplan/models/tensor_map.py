"""Which tensors of a model the stored ones become: transformers' own names and conversions, run without data.

transformers renames tensors while it loads them, and for some families merges several into one (the matrices of all
experts). Both are asked of its loader, so that a tensor is missing, unexpected or of a wrong shape exactly when it
would be at loading, and an export knows which stored tensors a parameter is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.errors import ModelError


@dataclass(frozen=True)
class TensorMap:
    """Stored names and the parameters they feed."""

    owners: dict[str, tuple[str, ...]]
    """Stored name to the model's names; empty for one that the model has no place for."""
    converted: frozenset[str]
    """Stored names whose values are merged, split or moved about on the way."""

    def stored_of(self) -> dict[str, tuple[str, ...]]:
        """The other way round: the model's name to the stored names that feed it."""
        found: dict[str, tuple[str, ...]] = {}
        for stored, owners in self.owners.items():
            for owner in owners:
                found[owner] = (*found.get(owner, ()), stored)
        return found


@dataclass(frozen=True)
class TensorAccount:
    """What stands between the stored tensors and a whole model; all empty when nothing does."""

    missing: tuple[str, ...]
    """Tensors of the model that no file holds."""
    unexpected: tuple[str, ...]
    """Stored tensors the model has no place for."""
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Name, stored shape, the model's shape."""

    @staticmethod
    def from_loading_info(info: Mapping[str, Any]) -> TensorAccount:
        """From what `from_pretrained(output_loading_info=True)` reports."""
        return TensorAccount(
            tuple(sorted(info["missing_keys"])),
            tuple(sorted(info["unexpected_keys"])),
            tuple(sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"])),
        )

    def with_missing(self, names: Iterable[str]) -> TensorAccount:
        """The same with these missing too; a tensor of another shape is counted once."""
        surely = {*self.missing, *names} - {name for name, *_ in self.misshaped}
        return replace(self, missing=tuple(sorted(surely)))

    def describe(self) -> str | None:
        """The faults in one line, each kind with its first tensor and how many more; None when there is none."""
        kinds = [
            (self.missing, "missing", ""),
            (self.unexpected, "unknown to the model", ""),
            (
                [name for name, _, _ in self.misshaped],
                "of another shape",
                ", {} for {}".format(*self.misshaped[0][1:]) if self.misshaped else "",
            ),
        ]
        faults = [
            f"{len(names)} {'tensor is' if len(names) == 1 else 'tensors are'} {what}"
            f" ({names[0]}{detail}{f' and {len(names) - 1} more' if len(names) > 1 else ''})"
            for names, what, detail in kinds
            if names
        ]
        return "; ".join(faults) or None


def name_parameters(model: nn.Module) -> dict[str, str]:
    """Every name in the state dict to the one `named_parameters` uses; tied parameters have several names."""
    first = {id(value): name for name, value in model.named_parameters()}
    return {name: first.get(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


def map_tensors(model: Any, stored: Iterable[str]) -> TensorMap:
    """Follows each stored name through the renamings and conversions that transformers has for the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    names, known = name_parameters(model), model.state_dict()
    owners: dict[str, tuple[str, ...]] = {}
    converted: set[str] = set()
    for name in sorted(stored, key=dot_natural_key):  # the loader's order: some renamings wait for a first match
        found, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if found not in known and name in known:
            found, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        targets = [found]
        if pattern is not None and pattern in by_pattern:
            converted.add(name)
            parts = by_pattern[pattern].target_patterns
            targets = [found.replace(parts[0], part) for part in parts]
        owners[name] = tuple(dict.fromkeys(names[target] for target in targets if target in names))
    return TensorMap(owners, frozenset(converted))


def find_unfed(model: nn.Module, placed: TensorMap) -> list[str]:
    """Parameters that no stored tensor feeds; a model's code may let that pass, and they are random then."""
    fed = placed.stored_of()
    return [name for name, _ in model.named_parameters() if name not in fed]


def account_for_tensors(
    model: Any, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], placed: TensorMap
) -> TensorAccount:
    """Lets transformers' loader place tensors of these dtypes and shapes, without data, into a model on the meta device.

    A parameter that a model's code would silently leave as it was initialised counts as missing too.

    Args:
        model: The model on the meta device; its parameters are replaced.
        stored: Name to dtype and shape.
        placed: Which parameters they feed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    unfed = find_unfed(model, placed)
    tensors: dict[str, Tensor] = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in stored.items()
    }
    transforms = get_model_conversion_mapping(model)
    for each in transforms:
        if isinstance(each, WeightConverter):
            each.force_cpu = False  # for tensors too large to convert on a device; without data none is
    loading = LoadStateDictConfig(device_map={"": torch.device("meta")}, weight_mapping=transforms, dtype=torch.float32)
    info, _ = convert_and_load_state_dict_in_model(
        model=model, state_dict=tensors, load_config=loading, disk_offload_index=None
    )
    model.mark_tied_weights_as_initialized(info)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    return TensorAccount.from_loading_info(info.to_dict()).with_missing([*unfed, *info.conversion_errors])


def convert_stored(
    template: Any, tensors: Mapping[str, Tensor], names: Sequence[str], *, size: tuple[int, ...] | None = None
) -> list[Tensor]:
    """Lets transformers' loader turn stored tensors into parameters or buffers of a model.

    Args:
        template: A model on the meta device; afterwards it is as before.
        tensors: All stored tensors that they are made of, or those of some rows.
        names: What is wanted.
        size: Shape of what the tensors make, where it is not the model's.

    Raises:
        ModelError: When the tensors do not make it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    before = [
        (slots, key, value)
        for module in template.modules()
        for slots in (module._parameters, module._buffers)
        for key, value in slots.items()
    ]
    places = [_find_slot(template, name) for name in names]
    if size is not None:
        for slots, key in places:
            slots[key] = nn.Parameter(torch.empty(size, dtype=slots[key].dtype, device="meta"))
    loading = LoadStateDictConfig(
        device_map={"": torch.device("cpu")},
        weight_mapping=get_model_conversion_mapping(template),
        dtype=torch.float32,
    )
    try:
        convert_and_load_state_dict_in_model(
            model=template, state_dict=dict(tensors), load_config=loading, disk_offload_index=None
        )
        found: list[Tensor] = [slots[key].detach() for slots, key in places]
    finally:
        for slots, key, value in before:
            slots[key] = value
    lacking = [name for name, value in zip(names, found, strict=True) if value.is_meta]
    if lacking:
        raise ModelError(f"{type(template).__name__}: {lacking[0]} cannot be made of {', '.join(list(tensors)[:3])}")
    return found


def _find_slot(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if key in module._parameters else module._buffers), key


def restore_stored_form(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes transformers' conversions: parameters of a loaded model to the tensors its checkpoint is made of."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(parameters))
