"""A safetensors file written tensor by tensor, with the bytes that the library writes when it has all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from layerplan.errors import CheckpointError
from layerplan.models.weight_files import HEADER_BYTES, StoredTensor

CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Promise:
    """A tensor that is still to be read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Any]]
    """Gives its bytes, in pieces, in order."""

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def promise_tensor(dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Promise:
    """A tensor that `read` will give in one piece, of this dtype."""

    def pieces() -> Iterator[Any]:
        value = read().detach().contiguous()
        if (value.dtype, tuple(value.shape)) != (dtype, tuple(shape)):
            raise CheckpointError(f"a tensor of {dtype} and {tuple(shape)} came as {value.dtype}, {tuple(value.shape)}")
        yield value.reshape(-1).view(torch.uint8).numpy()

    return Promise(dtype, tuple(shape), pieces)


def promise_copy(source: StoredTensor, dtype: torch.dtype) -> Promise:
    """A tensor of another file, byte for byte."""

    def pieces() -> Iterator[bytes]:
        with source.file.open("rb") as handle:
            handle.seek(source.start)
            for start in range(source.start, source.stop, CHUNK_BYTES):
                yield handle.read(min(CHUNK_BYTES, source.stop - start))

    return Promise(dtype, source.shape, pieces)


def write_safetensors(path: Path, tensors: Mapping[str, Promise], metadata: Mapping[str, str]) -> None:
    """Writes a file whose tensors are read one after the other, in the order the library gives them.

    Raises:
        CheckpointError: When a tensor has another dtype, shape or number of bytes than promised.
    """
    order = _ask_for_order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name, dtype in order.items():
        start, stop = stop, stop + tensors[name].num_bytes
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_BYTES)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(HEADER_BYTES, "little") + text)
        for name in order:
            written = sum(handle.write(piece) for piece in tensors[name].read())
            if written != tensors[name].num_bytes:
                raise CheckpointError(
                    f"{path}: {name} came with {written} bytes, {tensors[name].num_bytes} were promised"
                )


def _ask_for_order(tensors: Mapping[str, Promise]) -> dict[str, str]:
    """Name to the format's word for its dtype, in the order of a file that the library makes of one number each."""
    content = save({name: torch.zeros(1, dtype=each.dtype) for name, each in tensors.items()})
    size = int.from_bytes(content[:HEADER_BYTES], "little")
    header = json.loads(content[HEADER_BYTES : HEADER_BYTES + size])
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
