"""A base without the memory of its weights: every module and buffer as loading makes them, parameters on the meta device.

Names, shapes, ties and buffers are those of `load`: transformers' own loader places the stored tensors, without data, and
its own initialisation fills what no file holds. What the files lack or hold too much is refused here, by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerplan.errors import ModelError
from layerplan.models.base_check import (
    check_tensors,
    load_auto_config,
    refuse_adapter,
    refuse_code_without_consent,
    refuse_other_tasks,
)
from layerplan.models.files import fetch_model_folder, load_hf_config
from layerplan.models.meta import build_without_memory, explain_load_error
from layerplan.models.parameter_reader import ParameterReader
from layerplan.models.tensor_map import TensorMap, map_tensors
from layerplan.models.weight_files import read_stored_tensors


@dataclass(frozen=True)
class Skeleton:
    """A model in eval mode whose parameters are on the meta device, in float32, and where their values are."""

    model: nn.Module
    reader: ParameterReader


def load_skeleton(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Skeleton:
    """Builds a causal language model from its config and the headers of its files; reads no parameter.

    Raises:
        ModelError: When config or weights are missing or of an unknown architecture, a tensor is missing, unexpected or
            of another shape or of quantised numbers, or the model's own code is not allowed.
    """
    values = load_hf_config(name, revision=revision)
    refuse_code_without_consent(name, values, trust_remote_code=trust_remote_code)
    refuse_other_tasks(name, values)
    folder = fetch_model_folder(name, revision=revision, with_weights=True)
    refuse_adapter(name, folder)
    stored = read_stored_tensors(folder)
    config = load_auto_config(name, folder, trust_remote_code)

    def build() -> Any:
        return build_without_memory(config, name=name, trust_remote_code=trust_remote_code)

    model = build()
    placed = map_tensors(model, stored)
    check_tensors(name, model, stored)
    try:
        model.tie_weights(recompute_mapping=False)
        reader = ParameterReader(model, placed, stored, build)
        _fill_buffers(model, placed, reader)
    except ModelError:
        raise
    except Exception as error:  # a model's code can raise anything
        raise ModelError(explain_load_error(name, error)) from None
    return Skeleton(model.eval(), reader)


def _fill_buffers(model: Any, placed: TensorMap, reader: ParameterReader) -> None:
    """Buffers that no file holds are made by the model's own initialisation, the others read."""
    fed = {owner for owners in placed.owners.values() for owner in owners}
    known = model.state_dict()
    unfed = {name for name, _ in model.named_buffers() if name in known and name not in fed}
    model._move_missing_keys_from_meta_to_device(unfed, {"": torch.device("cpu")}, None, None)
    model._initialize_missing_keys(False)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            path, _, key = name.rpartition(".")
            model.get_submodule(path)._buffers[key] = reader.read_buffer(name)
