"""Files of a corpus, at a local path or an address: listed, opened, decompressed."""

from __future__ import annotations

import gzip
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from layerplan.errors import CorpusError
from layerplan.storage.address import BUCKETS, HADOOP, hide_keys, is_address, open_filesystem, split_options


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file: its address and size in bytes."""

    path: str
    size: int


COMPRESSIONS = (".gz", ".zst")


def is_compressed(path: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return split_options(path)[0].lower().endswith(COMPRESSIONS)


def list_files(path: str) -> list[FileEntry]:
    """The files at or below a path, sorted by name; hidden ones (`.name`, `_name`) below it are left out.

    Raises:
        CorpusError: When there is no such path or it cannot be opened.
    """
    try:
        filesystem, root = open_filesystem(path)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise CorpusError(f"{hide_keys(path)}: no such file or folder")
        if info.type == pafs.FileType.File:
            return [FileEntry(path if is_address(path) else root, info.size or 0)]
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        if isinstance(filesystem, pafs.LocalFileSystem):
            _check_links(root)
    except (pa.ArrowException, ValueError, OSError, ImportError) as error:
        raise CorpusError(f"{hide_keys(path)}: cannot be opened ({' '.join(str(error).split())[:300]})") from None
    prefix, options = _find_prefix(path), split_options(path)[1]
    start = len(root.rstrip("/")) + 1
    if path.partition("://")[0] in BUCKETS:
        for item in infos:
            if "?" in item.path:
                raise CorpusError(
                    f"{path}: {item.path!r} cannot be told from an address with options; rename it without `?`"
                )
    return [
        FileEntry(prefix + item.path + options, item.size or 0)
        for item in sorted(infos, key=lambda item: str(item.path))
        if item.type == pafs.FileType.File and not _is_hidden(item.path[start:])
    ]


def _check_links(root: str) -> None:
    """A link to nothing is passed over by pyarrow; a cache that lost a file must not become a smaller corpus."""
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            if path.is_symlink() and not path.exists() and not _is_hidden(str(path.relative_to(root))):
                raise CorpusError(f"{path}: is a link to {path.readlink()}, which is not there; fetch it again")


def _find_prefix(path: str) -> str:
    """What stands before the path that a file system gives for a file below an address: scheme, and host or user."""
    if not is_address(path):
        return ""
    scheme, _, rest = path.partition("://")
    host = rest.partition("/")[0]
    if scheme in HADOOP:
        return f"{scheme}://{host}"
    user, at, _ = host.rpartition("@")
    return f"{scheme}://{user}{at}"


def open_file(path: str) -> pa.NativeFile:
    """Opens a file for reading at any position."""
    filesystem, inner = open_filesystem(path)
    return filesystem.open_input_file(inner)


def open_stream(path: str) -> IO[bytes]:
    """Opens a file for reading from its beginning, decompressed by its ending (.gz, .zst)."""
    filesystem, inner = open_filesystem(path)
    raw: Any = filesystem.open_input_stream(inner, compression=None)
    name = split_options(path)[0].lower()
    if name.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    if name.endswith(".zst"):
        import zstandard

        # a .zst made by parallel compressors has many frames; by default only the first would be read
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return io.BufferedReader(raw, buffer_size=1 << 20)


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))
