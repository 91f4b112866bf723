"""The safetensors files of a model folder: which ones count, whether they are whole, and what their headers say.

A safetensors file is 8 bytes of header length, the header, and the bytes the header promises, so names, dtypes, shapes
and the place of every byte are known without loading a weight.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from layerplan.errors import ModelError
from layerplan.inside import leads_inside

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
HEADER_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""A safetensors header larger than this is no header (the format's own limit)."""
OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".ggml", ".h5", ".msgpack", ".ckpt", ".onnx", ".npz")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file's header describes it."""

    file: Path
    dtype: str
    """The format's name of it: `F32`, `BF16`, `F8_E4M3`."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int
    """The byte after its last."""


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that transformers reads: `model.safetensors`, else the shards of the index.

    Raises:
        ModelError: When there is neither, the index cannot be read, or a shard of it is missing.
    """
    there = {path.name for path in folder.glob("*.safetensors")}
    if WEIGHTS_NAME in there:
        return (folder / WEIGHTS_NAME,)
    if (folder / INDEX_NAME).is_file():
        wanted = sorted(set(read_index(folder).values()))
        missing = [name for name in wanted if name not in there]
        if missing:
            raise ModelError(
                f"model.name={folder}: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} of {INDEX_NAME}"
                f" is missing ({len(missing)} of {len(wanted)} files); half-written? Copy the folder again"
            )
        return tuple(folder / name for name in wanted)
    remedy = f"name the GGUF file itself, such as {folder}{os.sep}"
    names = (path.name for path in folder.iterdir())
    raise ModelError(f"model.name={folder}: {explain_absence(names, where='the folder', gguf_remedy=remedy)}")


def read_stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every stored tensor by name, from the headers alone.

    Raises:
        ModelError: Naming the file that is missing, damaged, or shorter than its own header says, or the tensor that
            two files hold.
    """
    found: dict[str, StoredTensor] = {}
    for path in find_weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in found:
                raise ModelError(f"model.name={folder}: {found[name].file.name} and {path.name} both hold {name}")
            found[name] = tensor
    if not found:
        raise ModelError(f"model.name={folder}: its safetensors files hold no tensor")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        ModelError: When the file is no safetensors file, or its length is not what its header promises.
    """
    places = _find_places(path)
    try:
        with safe_open(path, framework="np") as handle:  # proves that no bytes are missing, shared or left over
            opened = {name: handle.get_slice(name) for name in places}
            return {
                name: StoredTensor(path, each.get_dtype(), tuple(each.get_shape()), *places[name])
                for name, each in opened.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(_explain_damage(path, error)) from None


def _find_places(path: Path) -> dict[str, tuple[int, int]]:
    """First byte of each tensor and the one after its last; read by hand, since `safe_open` tells neither.

    Nor does it say by how much a file is too short, which is what a copy that was cut off is known by.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            (header_bytes,) = struct.unpack("<Q", handle.read(HEADER_BYTES))
            if header_bytes > min(size, MAX_HEADER_BYTES):
                raise ValueError("the header is cut off")
            header = json.loads(handle.read(header_bytes))
        first = HEADER_BYTES + header_bytes
        offsets = {name: item["data_offsets"] for name, item in header.items() if name != "__metadata__"}
        places = {name: (first + int(start), first + int(stop)) for name, (start, stop) in offsets.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(_explain_damage(path, error)) from None
    promised = max((stop for _, stop in places.values()), default=first)
    if promised != size:
        raise ModelError(
            f"model.name={path.parent}: {path.name} has {size:,} bytes, its header promises {promised:,};"
            " the file is half-written, copy it again"
        )
    return places


def _explain_damage(path: Path, error: Exception) -> str:
    return f"model.name={path.parent}: {path.name} is not a whole safetensors file ({error}); copy it again"


def read_bytes_into(path: Path, start: int, out: Any) -> None:
    """Fills a buffer of bytes from a place in a file on, without mapping the file.

    Raises:
        ModelError: When the file ends before.
    """
    view = memoryview(out).cast("B")
    with path.open("rb", buffering=0) as handle:
        handle.seek(start)
        filled = 0
        while filled < len(view):
            count = handle.readinto(view[filled:])
            if not count:
                raise ModelError(f"model.name={path.parent}: {path.name} ends before its tensors do; copy it again")
            filled += count


@contextmanager
def reading_bytes(tensor: StoredTensor) -> Iterator[memoryview]:
    """The tensor's bytes as they lie in the file, mapped and not copied."""
    if tensor.start == tensor.stop:
        yield memoryview(b"")
        return
    with tensor.file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)[tensor.start : tensor.stop]
        try:
            yield view
        finally:
            view.release()


def have_equal_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether dtype, shape and bytes are the same."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with reading_bytes(one) as mine, reading_bytes(other) as theirs:
        return mine == theirs


def read_index(folder: Path) -> dict[str, str]:
    """Tensor to file of `model.safetensors.index.json`.

    Raises:
        ModelError: When it cannot be read, or names a file outside the folder.
    """
    path = folder / INDEX_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"model.name={folder}: {INDEX_NAME} cannot be read ({error})") from None
    for file in index.values():
        if not leads_inside(file):
            raise ModelError(f"model.name={folder}: {INDEX_NAME} names {file!r}; a file of this folder is expected")
    return index


def explain_absence(names: Iterable[str], *, where: str, gguf_remedy: str) -> str:
    """Why there are no weights to read among the files of a model.

    Args:
        names: Of its files.
        where: What holds them.
        gguf_remedy: What to do where one of them is a GGUF file, whose name follows.
    """
    files = sorted(name for name in names if "/" not in name)
    if safetensors := [name for name in files if name.endswith(".safetensors")]:
        there = ", ".join(safetensors[:3])
        return f"holds {there}, but neither {WEIGHTS_NAME} nor {INDEX_NAME}, which say what belongs together"
    others = [name for name in files if name.lower().endswith(OTHER_FORMATS)]
    if not others:
        return f"{where} has no *.safetensors weights; it is not a whole checkpoint"
    if ggufs := [name for name in others if name.lower().endswith(".gguf")]:
        return f"{where} has no *.safetensors weights; {gguf_remedy}{ggufs[0]}"
    return (
        f"{where} has no *.safetensors weights, only {others[0]}{' ...' if len(others) > 1 else ''}; other formats are"
        " not read: load it with transformers and save it again with `save_pretrained`, which writes safetensors"
    )
