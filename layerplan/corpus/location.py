"""Where bytes lie: a local path, or an address that pyarrow (S3, GCS, HDFS) or fsspec (the rest) can open."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from layerplan.errors import CorpusError


@dataclass(frozen=True)
class FileEntry:
    """A file: its address and size in bytes."""

    path: str
    size: int


def is_address(path: str | Path) -> bool:
    """Whether the path is an address such as `s3://bucket/folder`, and not a local path."""
    return "://" in str(path)


def open_filesystem(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of a path, and the path within it.

    Raises:
        OSError: When the address has no known scheme or cannot be opened.
    """
    if not is_address(path):
        return pafs.LocalFileSystem(), str(Path(path).expanduser().resolve())
    scheme, _, inner = str(path).partition("://")
    if scheme in ("s3", "gs", "gcs", "hdfs", "viewfs", "file"):
        filesystem, inner = pafs.FileSystem.from_uri(str(path))
        return filesystem, inner
    try:
        return _open_fsspec(scheme), inner
    except (ValueError, ImportError) as error:
        raise OSError(f"no file system for {scheme}:// ({error})") from None


@lru_cache(maxsize=8)
def _open_fsspec(scheme: str) -> pafs.FileSystem:
    import fsspec

    return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))


def list_files(path: str) -> list[FileEntry]:
    """The files at or below a path, sorted by name; hidden ones (`.name`, `_name`) below it are left out.

    Raises:
        CorpusError: When there is no such path or it cannot be opened.
    """
    try:
        filesystem, root = open_filesystem(path)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise CorpusError(f"{path}: no such file or folder")
        if info.type == pafs.FileType.File:
            return [FileEntry(path if is_address(path) else root, info.size or 0)]
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    except (pa.ArrowException, ValueError, OSError, ImportError) as error:
        raise CorpusError(f"{path}: cannot be opened ({' '.join(str(error).split())[:300]})") from None
    prefix = path.partition("://")[0] + "://" if is_address(path) else ""
    start = len(root.rstrip("/")) + 1
    return [
        FileEntry(prefix + item.path, item.size or 0)
        for item in sorted(infos, key=lambda item: str(item.path))
        if item.type == pafs.FileType.File and not _is_hidden(item.path[start:])
    ]


def open_file(path: str) -> pa.NativeFile:
    """Opens a file for reading at any position."""
    filesystem, inner = open_filesystem(path)
    return filesystem.open_input_file(inner)


def open_stream(path: str) -> IO[bytes]:
    """Opens a file for reading from its beginning, decompressed by its ending (.gz, .zst)."""
    filesystem, inner = open_filesystem(path)
    raw: Any = filesystem.open_input_stream(inner, compression=None)
    if path.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        import zstandard

        # a .zst made by parallel compressors has many frames; by default only the first would be read
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return io.BufferedReader(raw, buffer_size=1 << 20)


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))
