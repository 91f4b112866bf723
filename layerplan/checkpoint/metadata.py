"""The `.metadata` of a distributed checkpoint, read without running anything in it.

PyTorch writes it as a pickle, and a pickle may name any function to be called. Here only the few classes it consists of
are known; a name of anything else ends the reading. Objects that are no tensors are refused too, because PyTorch reads
those as pickles of their own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import IO, Any

import torch
import torch.serialization
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from layerplan.checkpoint.layout import METADATA_NAME
from layerplan.errors import CheckpointError
from layerplan.inside import is_plain_name
from layerplan.storage.paths import StoredPath, explain, reaching

_METADATA_CLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
    dcp_metadata.StorageMeta,
    dcp_metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
)
_KNOWN: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__name__): cls for cls in _METADATA_CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    # the folder it was written to, of which nothing is read
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no metadata consists of")


def read_metadata(path: StoredPath) -> Metadata:
    """Reads the metadata of a checkpoint.

    Raises:
        CheckpointError: When it is missing, garbage, or names anything but tensors in files of this folder.
    """
    file = path / METADATA_NAME
    try:
        with reaching(file), file.open("rb") as handle:
            return parse_metadata(handle, file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({explain(error)})") from None


def parse_metadata(handle: IO[bytes], name: StoredPath) -> Metadata:
    """Reads it from an open file; `name` is for messages.

    Raises:
        CheckpointError: As `read_metadata`.
    """
    try:
        metadata = _MetadataUnpickler(handle).load()
        fault = _find_fault(metadata)
    except Exception as error:  # garbage makes an unpickler raise anything
        fault = str(error) or type(error).__name__
    if fault:
        raise CheckpointError(f"{name}: refused ({' '.join(fault.split())[:200]})")
    assert isinstance(metadata, Metadata)
    return metadata


def check_shards(path: StoredPath) -> None:
    """Whether each file of a checkpoint without a seal is there and long enough: all that can be known of it.

    Raises:
        CheckpointError: Naming the first that is not.
    """
    needed: dict[str, int] = {}
    for info in read_metadata(path).storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read ({explain(error)})") from None
        if found < size:
            raise CheckpointError(f"{path / name}: has {found} bytes, the metadata speaks of {size}")


def _find_fault(metadata: Any) -> str:
    if not isinstance(metadata, Metadata):
        return f"it holds a {type(metadata).__name__}"
    if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
        return "it lists no tensors"
    checks: list[tuple[Callable[[Any, Any], bool], dict[Any, Any]]] = [
        (_is_tensor, metadata.state_dict_metadata),
        (_is_place, metadata.storage_data),
    ]
    for check, entries in checks:
        for key, entry in entries.items():
            if not check(key, entry):
                return f"{str(getattr(key, 'fqn', key))[:80]}: not a tensor in a file of this folder"
    return ""


def _is_tensor(name: Any, entry: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(entry, TensorStorageMetadata)
        and isinstance(entry.properties, TensorProperties)
        and isinstance(entry.properties.dtype, torch.dtype)
        and _is_shape(entry.size)
        and isinstance(entry.chunks, list)
        and all(
            isinstance(c, ChunkStorageMetadata) and _is_shape(c.offsets) and _is_shape(c.sizes) for c in entry.chunks
        )
    )


def _is_shape(size: Any) -> bool:
    return isinstance(size, torch.Size) and all(type(number) is int and number >= 0 for number in size)


def _is_place(index: Any, info: Any) -> bool:
    return (
        isinstance(index, MetadataIndex)
        and isinstance(index.fqn, str)
        and isinstance(info, filesystem._StorageInfo)
        and is_plain_name(info.relative_path)
        and all(type(number) is int and number >= 0 for number in (info.offset, info.length))
        and not info.transform_descriptors
    )
