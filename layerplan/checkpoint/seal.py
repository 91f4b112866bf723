"""The seal of a checkpoint: size and hash of every file in it, written last.

A checkpoint without its seal is unfinished; one whose files are not those of the seal is damaged or mixed. The hash is
XXH3 with 128 bits, which runs faster than memory is read: it finds accidents (flipped bits, cut files, shards of
another step), not tampering, as whoever changes a file can write the seal anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash
from pydantic import Field, ValidationError, field_validator

from layerplan.checkpoint.layout import FORMAT, read_json, write_json
from layerplan.config.base import StrictModel, describe_fault
from layerplan.errors import CheckpointError
from layerplan.inside import is_plain_name
from layerplan.run_folder import SEAL_NAME, STATE_NAME
from layerplan.storage.paths import StoredPath, explain, reaching

_SELF_KEY = "seal_xxh3_128"
_CHUNK = 4 << 20
_THREADS = 4


class FileMark(StrictModel):
    """What a file must be."""

    size: int = Field(ge=0)
    """Bytes."""
    xxh3_128: str = Field(pattern="^[0-9a-f]{32}$")
    """Over all of them."""


class Seal(StrictModel):
    """What a checkpoint is, and what its files are."""

    format: int = Field(default=FORMAT, ge=1, le=FORMAT)
    step: int = Field(ge=0)
    tokens_seen: int = Field(ge=0)
    plan_sha256: str
    corpus_sha256: str
    run_id: str
    """Drawn when the run began; tells two runs of one plan apart."""
    files: dict[str, FileMark] = Field(min_length=1)
    """By name in the checkpoint's folder."""

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileMark]) -> dict[str, FileMark]:
        for name in files:
            if not is_plain_name(name):
                raise ValueError(f"{name!r} is not the name of a file in the folder")
        if STATE_NAME not in files:
            raise ValueError(f"{STATE_NAME} is missing")
        return files


class Marker:
    """Takes the bytes of a file as they are written."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self._size = 0

    def update(self, piece: Any) -> None:
        """Takes the next bytes, anything with a buffer."""
        self._hash.update(piece)
        self._size += memoryview(piece).nbytes

    def finish(self) -> FileMark:
        """The mark of all bytes so far."""
        return FileMark(size=self._size, xxh3_128=self._hash.hexdigest())


def mark_bytes(content: bytes) -> FileMark:
    """The mark of a small file."""
    marker = Marker()
    marker.update(content)
    return marker.finish()


def mark_file(path: StoredPath) -> FileMark:
    """Reads a file through."""
    marker = Marker()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as handle:
        while size := handle.readinto(buffer):
            marker.update(buffer[:size])
    return marker.finish()


def write_seal(folder: StoredPath, seal: Seal) -> None:
    """Writes the seal atomically; from then on the checkpoint counts."""
    values = seal.model_dump(mode="json")
    write_json(folder / SEAL_NAME, values | {_SELF_KEY: _hash_values(values)})


def read_seal(folder: StoredPath) -> Seal | None:
    """Reads the seal, or returns None when there is none.

    Raises:
        CheckpointError: When the file is not a seal, or not the one that was written.
    """
    path = folder / SEAL_NAME
    try:
        values = read_json(path)
    except FileNotFoundError:
        return None
    if values.pop(_SELF_KEY, None) != _hash_values(values):
        raise CheckpointError(f"{path}: not the bytes that were written, its content does not have the hash it states")
    try:
        return Seal.model_validate(values)
    except ValidationError as error:
        raise CheckpointError(f"{path}: not a seal of format {FORMAT} ({describe_fault(error)})") from None


def check_files(folder: StoredPath, seal: Seal, names: Iterable[str] | None = None) -> None:
    """Reads the named files, or all of the seal's, and compares them with it.

    Raises:
        CheckpointError: Naming the first file that is not what was written.
    """
    names = list(seal.files if names is None else names)
    for name in names:
        _check_size(folder / name, seal.files[name])
    with ThreadPoolExecutor(max_workers=min(_THREADS, max(1, len(names)))) as pool:
        list(pool.map(lambda name: _check_hash(folder / name, seal.files[name]), names))


def _check_size(path: StoredPath, mark: FileMark) -> None:
    try:
        with reaching(path):
            size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({explain(error)})") from None
    if size != mark.size or not path.is_file():
        raise CheckpointError(f"{path}: has {size} bytes, {mark.size} were written")


def _check_hash(path: StoredPath, mark: FileMark) -> None:
    try:
        with reaching(path):
            found = mark_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({explain(error)})") from None
    if found != mark:
        raise CheckpointError(
            f"{path}: not the bytes that were written (xxh3_128 {found.xxh3_128[:12]}, sealed {mark.xxh3_128[:12]})"
        )


def _hash_values(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
