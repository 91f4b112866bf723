"""Files of a corpus, at a local path or an address: listed, opened, decompressed."""

from __future__ import annotations

import gzip
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from layerplan.corpus.file_table import FileTable, LeftOut
from layerplan.errors import CorpusError
from layerplan.storage.address import BUCKETS, HADOOP, hide_keys, is_address, open_filesystem, split_options

COMPRESSIONS = (".gz", ".zst")
HIDDEN = (".", "_")
"""How names begin that are no documents."""
ZSTD_PIECE_BYTES = 8 * 2**10
"""Compressed bytes that are decompressed at a time: what they become is held in memory."""


def is_compressed(path: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return split_options(path)[0].lower().endswith(COMPRESSIONS)


def list_files(path: str) -> FileTable:
    """The files at or below a path, sorted by name; hidden ones (`.name`, `_name`) below it are left out, and counted.

    Raises:
        CorpusError: When there is no such path or it cannot be opened, or a link or a name in it is broken.
    """
    try:
        filesystem, root = open_filesystem(path)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            hint = "; patterns are not read, name the folder" if set("*?[") & set(path) else ""
            raise CorpusError(f"{hide_keys(path)}: no such file or folder{hint}")
        if info.type == pafs.FileType.File:
            name, options = split_options(path) if is_address(path) else (root, "")
            return FileTable.collect([(name, info.size or 0)], after=options)
        folder = root.rstrip("/") + "/"
        hidden, odd = LeftOut(), LeftOut()
        if isinstance(filesystem, pafs.LocalFileSystem):
            files = FileTable.collect(_walk(folder, hidden, odd), _find_prefix(path) + folder).sort()
        else:
            found = _list_remote(filesystem, folder, path, hidden)
            files = FileTable.collect(found, _find_prefix(path), split_options(path)[1]).sort()
        files.left_out = {"hidden": hidden, "that are no regular files": odd}
        return files
    except (pa.ArrowException, ValueError, OSError, ImportError) as error:
        raise CorpusError(f"{hide_keys(path)}: cannot be opened ({' '.join(str(error).split())[:300]})") from None


def _walk(root: str, hidden: LeftOut, odd: LeftOut) -> Iterator[tuple[str, int]]:
    """Names below a folder of this machine, and sizes; no folder is held in memory.

    A hidden folder is not walked, and counts for one; what is neither a file nor a folder (a pipe, a socket) is odd.
    """
    pending = [""]
    while pending:
        inner = pending.pop()
        with os.scandir(root + inner) as entries:
            for entry in entries:
                if entry.name.startswith(HIDDEN):
                    hidden.add(f"{inner}{entry.name}{'/' if entry.is_dir(follow_symlinks=False) else ''}")
                    continue
                if entry.is_dir():
                    pending.append(f"{inner}{entry.name}/")
                elif entry.is_symlink() and not (link := Path(entry.path)).exists():
                    # a cache that lost a file must not become a smaller corpus
                    raise CorpusError(f"{link}: is a link to {link.readlink()}, which is not there; fetch it again")
                elif stat.S_ISREG((facts := entry.stat()).st_mode):
                    yield inner + entry.name, facts.st_size
                else:
                    odd.add(inner + entry.name)


def _list_remote(filesystem: pafs.FileSystem, root: str, path: str, hidden: LeftOut) -> Iterator[tuple[str, int]]:
    """Paths below a folder at an address, and sizes: in one listing, since each takes a request."""
    is_bucket, start = path.partition("://")[0] in BUCKETS, len(root.removeprefix("/"))
    for item in filesystem.get_file_info(pafs.FileSelector(root, recursive=True)):
        name = item.path.removeprefix("/")[start:]
        if is_bucket and "?" in item.path:
            raise CorpusError(
                f"{path}: {item.path!r} cannot be told from an address with options; rename it without `?`"
            )
        if item.type != pafs.FileType.File:
            continue
        if any(part.startswith(HIDDEN) for part in name.split("/")):
            hidden.add(name)
        else:
            yield item.path, item.size or 0


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
        return io.BufferedReader(_ZstdFrames(raw))
    return io.BufferedReader(raw, buffer_size=1 << 20)


class _ZstdFrames(io.RawIOBase):
    """The frames of a `.zst`, many where parallel compressors made it; one that is cut short is told as `gzip` tells it.

    The library's own stream takes such a cut for the end of the file.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._frame: Any = None
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._raw.read(ZSTD_PIECE_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _decompress(self) -> None:
        import zstandard

        frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        self._text = memoryview(frame.decompress(self._compressed))
        self._compressed, self._frame = frame.unused_data, None if frame.eof else frame

    def close(self) -> None:
        self._raw.close()
        super().close()
