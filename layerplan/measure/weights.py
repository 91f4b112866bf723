"""Which stored tensors are weight matrices of which decoder layer, from headers and the model's own names."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from layerplan.errors import ModelError
from layerplan.measure.spectrum import Matrix, name_kind, read_snr
from layerplan.measure.work import timed
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.parameter_names import build_unloaded
from layerplan.models.ref import ModelRef
from layerplan.models.tensor_map import map_tensors
from layerplan.models.weight_files import read_stored_tensors

FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored dtypes whose numbers are the weights themselves; smaller ones have scales beside them."""


def list_matrices(model: ModelRef) -> list[Matrix]:
    """Every weight matrix of every decoder layer, no weight read but the headers.

    Raises:
        ModelError: When the model has none that can be read by itself.
    """
    built = build_unloaded(model)
    parts = find_decoder_parts(built)
    stored = read_stored_tensors(model.folder(with_weights=True))
    owners = map_tensors(built, stored).owners
    matrix_names = _name_matrices(built)
    found = []
    for name, tensor in sorted(stored.items()):
        places = [name_kind(owner, parts.layers_path) for owner in owners.get(name, ()) if owner in matrix_names]
        place = next((each for each in places if each is not None), None)
        if place is not None and tensor.dtype in FLOATS and len(tensor.shape) >= 2 and min(tensor.shape[-2:]) > 1:
            found.append(Matrix(name, str(tensor.file), *place, tensor.shape))
    missing = sorted(set(range(len(parts.layers))) - {matrix.layer for matrix in found})
    if missing:
        raise ModelError(
            f"model.name={model}: layer {missing[0]} has no weight matrix in {', '.join(FLOATS)}; spectrum reads weights"
            " as they are stored, so measure a model that is not quantised"
        )
    return found


def _name_matrices(model: nn.Module) -> set[str]:
    """Parameters with two or more dimensions that are no convolutions, whose last two are no matrix."""
    convolutions = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Conv1d | nn.Conv2d)
    }
    return {name for name, value in model.named_parameters() if value.ndim >= 2} - convolutions


class WeightActor:
    """Maps rows that name one matrix each to its signal to noise; loads nothing but that matrix."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Measures the matrices, one result per row."""
        results = [timed(partial(_measure, matrix)) for matrix in batch["matrix"]]
        return {
            "key": list(batch["key"]),
            "values": [values for values, _ in results],
            "seconds": [seconds for _, seconds in results],
        }


def _measure(row: Any) -> list[list[float]]:
    return [[read_snr(decode_matrix(row))]]


def decode_matrix(value: Any) -> Matrix:
    """The matrix of a row that Ray Data carried."""
    shape = tuple(int(size) for size in value["shape"])
    return Matrix(str(value["name"]), str(value["file"]), int(value["layer"]), str(value["kind"]), shape)
