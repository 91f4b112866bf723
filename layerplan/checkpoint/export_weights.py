"""The weight files of an export: the base's own files, tensor by tensor, with what trained in place of what was there.

Names, dtypes and the division into files are the base's, so a tensor that is frozen is written from the bytes it was
read from, whatever their dtype. What trained is rounded from its float32 master to the dtype the base keeps it in, or
stays float32 when that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from layerplan.errors import CheckpointError
from layerplan.models.base_check import ALL_DTYPES, DTYPES
from layerplan.models.safetensors_writer import Promise, promise_copy, promise_tensor, write_safetensors
from layerplan.models.tensor_map import map_tensors, restore_stored_form
from layerplan.models.weight_files import (
    INDEX_NAME,
    WEIGHTS_NAME,
    StoredTensor,
    find_weight_files,
    read_stored_tensors,
)


@dataclass(frozen=True)
class BaseWeights:
    """A base's stored tensors, sorted by what the plan does to the parameters they make up."""

    folder: Path
    stored: dict[str, StoredTensor]
    frozen: tuple[str, ...]
    """Stored names whose bytes the export must have: frozen parameters and buffers."""
    direct: dict[str, str]
    """Stored name to the trained parameter it holds as it is."""
    converted: dict[str, tuple[str, ...]]
    """Stored name to the trained parameters it is merged into or split among."""
    dtypes: dict[str, tuple[torch.dtype, ...]]
    """Trained parameter to the dtypes of its stored tensors."""


def sort_base_weights(model: Any, folder: Path, trainable: Collection[str], *, as_float32: bool) -> BaseWeights:
    """Reads the headers of the base and finds what is frozen and what trained.

    Args:
        model: The base, loaded.
        folder: The base's folder.
        trainable: Names of the parameters that train.
        as_float32: Whether what trained is written in float32.

    Raises:
        CheckpointError: When a stored tensor is made of trained and frozen parameters.
    """
    stored = read_stored_tensors(folder)
    placed = map_tensors(model, stored)
    frozen: list[str] = []
    direct: dict[str, str] = {}
    converted: dict[str, tuple[str, ...]] = {}
    dtypes: dict[str, tuple[torch.dtype, ...]] = {}
    for name, owners in placed.owners.items():
        trained = [owner for owner in owners if owner in trainable]
        if not trained:
            frozen.append(name)
            continue
        if len(trained) != len(owners):
            raise CheckpointError(f"{folder}: {name} is made of trained and frozen parameters ({', '.join(owners)})")
        if name in placed.converted:
            converted[name] = owners
        else:
            direct[name] = owners[0]
        kept = torch.float32 if as_float32 else DTYPES[stored[name].dtype]
        for owner in owners:
            dtypes[owner] = tuple(dict.fromkeys((*dtypes.get(owner, ()), kept)))
    return BaseWeights(folder, stored, tuple(frozen), direct, converted, dtypes)


def round_as_stored(weights: BaseWeights, name: str, master: Tensor) -> Tensor:
    """A trained parameter's float32 master at the precision the export has for it, in float32.

    Raises:
        CheckpointError: When the dtype cannot hold a value.
    """
    rounded = master
    for dtype in weights.dtypes[name]:
        rounded = rounded.to(dtype).float()
    if not torch.equal(rounded.isfinite(), master.isfinite()):
        raise CheckpointError(
            f"{name}: trained to values that {' and '.join(str(each) for each in weights.dtypes[name])} cannot hold;"
            " set train.export_dtype: float32"
        )
    return rounded


def write_weights(weights: BaseWeights, model: nn.Module, read: Callable[[str], Tensor], out_dir: Path) -> None:
    """Writes every file of the base anew, one tensor in memory at a time, and the index when the base has one.

    Args:
        weights: The base's tensors.
        model: Of the base's class, on the meta device or not; says how conversions are undone.
        read: From a trained parameter's name to its values at the precision they are exported in, float32.
        out_dir: Folder for the files.

    Raises:
        CheckpointError: When a tensor of the base is stored in a dtype that cannot be written.
    """
    files = find_weight_files(weights.folder)
    restored = _promise_converted(weights, model, read)
    homes: dict[str, str] = {}
    num_bytes = 0
    for path in files:
        tensors = {name: each for name, each in restored.items() if _find_home(weights, name) == path}
        for name, source in weights.stored.items():
            if source.file == path and name not in weights.converted:
                tensors[name] = _promise(weights, name, read)
        with safe_open(path, framework="np") as handle:
            metadata = handle.metadata() or {"format": "pt"}
        write_safetensors(out_dir / path.name, tensors, metadata)
        homes |= dict.fromkeys(tensors, path.name)
        num_bytes += sum(each.num_bytes for each in tensors.values())
    if files[0].name != WEIGHTS_NAME:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(homes.items()))}
        (out_dir / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _promise(weights: BaseWeights, name: str, read: Callable[[str], Tensor]) -> Promise:
    """A stored tensor that is what it was, or the trained parameter that stands in its place."""
    source = weights.stored[name]
    if name in weights.direct:
        owner = weights.direct[name]
        dtype = _pick_dtype(weights, name, owner)
        return promise_tensor(dtype, source.shape, lambda: read(owner).to(dtype))
    if source.dtype not in ALL_DTYPES:
        raise CheckpointError(f"{source.file}: {name} is stored as {source.dtype}, which cannot be written")
    return promise_copy(source, ALL_DTYPES[source.dtype])


def _promise_converted(weights: BaseWeights, model: Any, read: Callable[[str], Tensor]) -> dict[str, Promise]:
    """Tensors under the names transformers gives them, which are the base's unless it is of an older form."""
    parameters = dict(model.named_parameters())
    promises: dict[str, Promise] = {}
    for group in _group_owners(weights):
        restore = _Restoring(model, group, {name: weights.dtypes[name][0] for name in group}, read)
        shapes = {
            name: torch.empty(parameters[name].shape, device="meta", dtype=dtype)
            for name, dtype in restore.dtypes.items()
        }
        for name, value in restore_stored_form(model, shapes).items():
            promises[name] = promise_tensor(value.dtype, tuple(value.shape), partial(restore.get, name))
    return promises


def _group_owners(weights: BaseWeights) -> list[tuple[str, ...]]:
    """Trained parameters that are made of the same stored tensors."""
    groups: list[set[str]] = []
    for owners in weights.converted.values():
        touching = [group for group in groups if group & set(owners)]
        groups = [group for group in groups if group not in touching] + [set(owners).union(*touching)]
    return [tuple(sorted(group)) for group in groups]


@dataclass
class _Restoring:
    """The stored form of a few parameters, made when it is first asked for and kept until all of it was taken."""

    model: Any
    names: tuple[str, ...]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]
    made: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str) -> Tensor:
        """One of the tensors, given away."""
        if name not in self.made:
            narrowed = {each: self.read(each).to(self.dtypes[each]) for each in self.names}
            self.made = restore_stored_form(self.model, narrowed)
        return self.made.pop(name)


def _find_home(weights: BaseWeights, name: str) -> Path:
    """The file a tensor is written to: the one it was in, or one that held others like it."""
    return weights.stored[name if name in weights.converted else next(iter(weights.converted))].file


def _pick_dtype(weights: BaseWeights, name: str, owner: str) -> torch.dtype:
    kept = DTYPES[weights.stored[name].dtype]
    return kept if kept in weights.dtypes[owner] else torch.float32
