"""The weight files of an export: the base's own files, tensor by tensor, with what trained in place of what was there.

Names, dtypes and the division into files are the base's, so a tensor that is frozen is written from the bytes it was
read from, whatever their dtype. What trained is rounded from its float32 master to the dtype the base keeps it in, or
stays float32 when that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerplan.errors import CheckpointError
from layerplan.models.base_check import DTYPES
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


def write_weights(weights: BaseWeights, model: Any, parameters: Mapping[str, Tensor], out_dir: Path) -> None:
    """Writes every file of the base anew, one in memory at a time, and the index when the base has one.

    Args:
        weights: The base's tensors.
        model: The trained model; says how conversions are undone.
        parameters: Its parameters by name, in float32.
        out_dir: Folder for the files.
    """
    files = find_weight_files(weights.folder)
    restored = _restore_converted(weights, model, parameters)
    homes: dict[str, str] = {}
    num_bytes = 0
    for path in files:
        tensors = {name: value for name, value in restored.items() if _find_home(weights, name) == path}
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {"format": "pt"}
            for name in (each for each, tensor in weights.stored.items() if tensor.file == path):
                if name in weights.direct:
                    owner = weights.direct[name]
                    tensors[name] = (
                        parameters[owner].detach().to(_pick_dtype(weights, name, owner), copy=True).contiguous()
                    )
                elif name not in weights.converted:
                    tensors[name] = handle.get_tensor(name)
        save_file(tensors, out_dir / path.name, metadata=metadata)
        homes |= dict.fromkeys(tensors, path.name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if files[0].name != WEIGHTS_NAME:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(homes.items()))}
        (out_dir / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _restore_converted(weights: BaseWeights, model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names transformers gives them, which are the base's unless it is of an older form."""
    owners = {owner for each in weights.converted.values() for owner in each}
    if not owners:
        return {}
    narrowed = {name: parameters[name].detach().to(weights.dtypes[name][0]) for name in owners}
    return {name: value.contiguous() for name, value in restore_stored_form(model, narrowed).items()}


def _find_home(weights: BaseWeights, name: str) -> Path:
    """The file a tensor is written to: the one it was in, or one that held others like it."""
    return weights.stored[name if name in weights.converted else next(iter(weights.converted))].file


def _pick_dtype(weights: BaseWeights, name: str, owner: str) -> torch.dtype:
    kept = DTYPES[weights.stored[name].dtype]
    return kept if kept in weights.dtypes[owner] else torch.float32
