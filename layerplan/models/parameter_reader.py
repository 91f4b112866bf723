"""Parameters out of a model's files, one at a time and whole or some of their rows: no file is mapped, no other tensor read.

A parameter that is stored as it is comes from its own bytes. One that transformers merges or splits while it loads goes
through transformers' own conversion of the tensors it is made of; where every expert has tensors of its own, through that of
the experts asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.errors import ModelError
from layerplan.models.base_check import DTYPES
from layerplan.models.tensor_map import TensorMap, convert_stored, name_parameters
from layerplan.models.weight_files import StoredTensor, read_bytes_into

CHUNK_BYTES = 32 * 2**20
"""Read at once where bytes are converted on their way."""


@dataclass(frozen=True)
class _Parameter:
    dtype: torch.dtype
    """What loading gives it."""
    shape: torch.Size
    sources: tuple[str, ...]
    """Stored names."""


class ParameterReader:
    """Values of a model's parameters by their Hugging Face names; one that is tied goes by each of its names."""

    def __init__(
        self,
        model: nn.Module,
        placed: TensorMap,
        stored: Mapping[str, StoredTensor],
        build: Callable[[], nn.Module],
    ) -> None:
        """Remembers where everything is; reads nothing.

        Args:
            model: On the meta device.
            placed: Which parameters the stored tensors feed.
            stored: The tensors of the files.
            build: Makes another model like it, for conversions.
        """
        self._stored, self._build, self.placed = dict(stored), build, placed
        sources = placed.stored_of()
        self._first_names = name_parameters(model)
        self._parameters = {
            name: _Parameter(value.dtype, value.shape, sources.get(name, ()))
            for name, value in model.named_parameters()
        }
        self._buffer_sources = {name: sources[name] for name, _ in model.named_buffers() if name in sources}

    def __contains__(self, name: str) -> bool:
        return name in self._first_names

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """A whole parameter on the CPU, in the dtype that loading gives it unless another is asked for."""
        parameter = self._find(name)
        value = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
        self.read_into(name, value)
        return value

    @torch.no_grad()
    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """Reads rows of a parameter, from `first_row` on as many as `out` has, rounded as loading and casting would.

        Args:
            name: The parameter.
            out: Contiguous, on any device, of any dtype; all dimensions but the first are the parameter's.
            first_row: Where in the parameter's first dimension to begin.

        Raises:
            ModelError: When the file no longer holds the bytes, or the tensors cannot be converted.
        """
        if out.numel() == 0:
            return
        parameter = self._find(name)
        if not parameter.sources:
            raise ModelError(f"{name}: no stored tensor holds it")
        if self.placed.converted.isdisjoint(parameter.sources):
            _copy_rows(self._stored[parameter.sources[0]], out, first_row, loaded_as=parameter.dtype)
            return
        last_row = first_row + (len(out) if out.ndim else 0)
        out.copy_(self._convert(self._first_names[name], parameter, first_row, last_row).to(parameter.dtype))

    def read_buffer(self, name: str) -> Tensor:
        """A whole buffer, as loading gives it."""
        (value,) = convert_stored(self._template, self._load(self._buffer_sources[name]), [name])
        return value

    def _find(self, name: str) -> _Parameter:
        return self._parameters[self._first_names[name]]

    def _convert(self, name: str, parameter: _Parameter, first_row: int, last_row: int) -> Tensor:
        """Rows of a parameter that is made of other tensors."""
        experts = _sort_by_expert(parameter.sources, len(parameter.shape) and parameter.shape[0])
        if experts is not None and last_row - first_row < parameter.shape[0]:
            chosen = [source for source, expert in experts.items() if first_row <= expert < last_row]
            size = (last_row - first_row, *parameter.shape[1:])
            (value,) = convert_stored(self._template, self._load(chosen), [name], size=size)
            return value
        (value,) = convert_stored(self._template, self._load(parameter.sources), [name])
        return value[first_row:last_row] if parameter.shape else value

    def _load(self, names: Iterable[str]) -> dict[str, Tensor]:
        from safetensors import safe_open

        tensors = {}
        for name in names:
            with safe_open(self._stored[name].file, framework="pt", backend="pread") as handle:
                tensors[name] = handle.get_tensor(name)
        return tensors

    @cached_property
    def _template(self) -> Any:
        return self._build()


def _copy_rows(source: StoredTensor, out: Tensor, first_row: int, *, loaded_as: torch.dtype) -> None:
    kept = DTYPES[source.dtype]
    row_bytes = kept.itemsize * (out.numel() // max(1, len(out)) if out.ndim else 1)
    start = source.start + first_row * row_bytes
    flat = out.view(-1)
    is_kept = flat.dtype == kept and _holds(loaded_as, kept)
    if is_kept and flat.device.type == "cpu":
        read_bytes_into(source.file, start, flat.view(torch.uint8).numpy())
        return
    size = CHUNK_BYTES // kept.itemsize
    for at in range(0, flat.numel(), size):
        piece = torch.empty(min(size, flat.numel() - at), dtype=kept)
        read_bytes_into(source.file, start + at * kept.itemsize, piece.view(torch.uint8).numpy())
        flat[at : at + size].copy_(piece if is_kept else piece.to(loaded_as))


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a value survives the way there and back."""
    return wide == narrow or (wide == torch.float32 and narrow in (torch.bfloat16, torch.float16))


def _sort_by_expert(sources: Iterable[str], num_experts: int) -> dict[str, int] | None:
    """Stored name to the row it becomes, where the names count the rows at one place; else None."""
    split = {name: name.split(".") for name in sources}
    if num_experts < 2 or len({len(parts) for parts in split.values()}) != 1:
        return None
    places = range(len(next(iter(split.values()))))
    counting = [
        at for at in places if {parts[at] for parts in split.values()} == {str(index) for index in range(num_experts)}
    ]
    return {name: int(parts[counting[0]]) for name, parts in split.items()} if len(counting) == 1 else None
