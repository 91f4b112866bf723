"""One way to name a file in a folder or in a bucket, and what the two do differently.

`BucketPath` has the part of `pathlib.Path` that checkpoints need. It holds the address alone, so it travels by pickle
without keys: every process opens the file system from its own environment. In a bucket a file is there as a whole or not
at all, nothing is appended to, and a folder is not moved: what says that a folder is complete is a file written last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from layerplan.aside import write_bytes
from layerplan.errors import StorageError
from layerplan.storage.address import open_filesystem


@dataclass(frozen=True)
class FileSize:
    """What is asked of `stat`."""

    st_size: int
    """Bytes."""


@dataclass(frozen=True)
class BucketFile:
    """A file of a listing."""

    name: str
    """Below the folder that was listed."""
    inner: str
    """Path within the file system."""
    size: int
    """Bytes."""
    time_ns: int
    """When it was written."""


_OPTIONS = dict.fromkeys(("gs", "gcs"), "?retry_limit_seconds=30")
"""Google's client tries again for 15 minutes, in which nothing is said."""


@dataclass(frozen=True)
class BucketPath:
    """A file or folder in a bucket."""

    address: str
    """`s3://bucket/folder/file`, without a slash at its end."""

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(f"{self.address}/{name}")

    @property
    def name(self) -> str:
        """After the last slash."""
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> BucketPath:
        """Before the last slash."""
        return BucketPath(self.address.rpartition("/")[0])

    def with_name(self, name: str) -> BucketPath:
        """A sibling."""
        return self.parent / name

    def open_arrow(self) -> tuple[pafs.FileSystem, str]:
        """The file system and the path within it, opened by this process."""
        return open_filesystem(self.address + _OPTIONS.get(self.address.partition("://")[0], ""))

    def exists(self) -> bool:
        """Whether there is a file, or any file below it."""
        return self._ask().type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._ask().type == pafs.FileType.File

    def is_dir(self) -> bool:
        """Whether files lie below it."""
        return bool(self.list_files())

    def stat(self) -> FileSize:
        """The size of a file; raises `FileNotFoundError` when there is none."""
        info = self._ask()
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(2, "no such file", self.address)
        return FileSize(info.size)

    def iterdir(self) -> Iterator[BucketPath]:
        """What lies directly in it, folders by the files below them; nothing when there is no such folder."""
        return iter([self / name for name in sorted({file.name.partition("/")[0] for file in self.list_files()})])

    def list_files(self) -> list[BucketFile]:
        """Every file below it, by one listing: a folder of GCS that nobody made shows only in its files."""
        with reaching(self):
            filesystem, inner = self.open_arrow()
            infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True, allow_not_found=True))
        return [
            BucketFile(info.path[len(inner) + 1 :], info.path, info.size, info.mtime_ns)
            for info in infos
            if info.type == pafs.FileType.File
        ]

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """What lies directly in it and begins like this; the pattern is a beginning and a star."""
        beginning, star, rest = pattern.partition("*")
        assert star and not rest and "/" not in beginning, pattern
        return (path for path in self.iterdir() if path.name.startswith(beginning))

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:
        """Opens for reading at any place, or for writing from the beginning; what is written is there once it is closed."""
        with reaching(self):
            filesystem, inner = self.open_arrow()
            opened: Any = filesystem.open_input_file(inner) if mode == "rb" else filesystem.open_output_stream(inner)
        return opened

    def read_bytes(self) -> bytes:
        """The whole file."""
        with reaching(self), self.open() as handle:
            return bytes(handle.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Replaces the whole file."""
        with reaching(self, may_lack=False), self.open("wb") as handle:
            handle.write(content)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Replaces the whole file by text."""
        self.write_bytes(text.encode(encoding))

    def touch(self) -> None:
        """Makes an empty file."""
        self.write_bytes(b"")

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a bucket has no folders."""

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Removes a file."""
        try:
            with reaching(self):
                filesystem, inner = self.open_arrow()
                filesystem.delete_file(inner)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: BucketPath) -> None:
        """Moves one small file: it is copied, then removed here."""
        target.write_bytes(self.read_bytes())
        self.unlink()

    def _ask(self) -> pafs.FileInfo:
        with reaching(self):
            filesystem, inner = self.open_arrow()
            return filesystem.get_file_info(inner)


StoredPath = Path | BucketPath


@contextmanager
def reaching(path: StoredPath, *, may_lack: bool = True) -> Iterator[None]:
    """Tells a file that is not there, or a disk that fails, from a bucket that does not answer.

    A bucket that cannot be reached says nothing about the file: who asks must stop, and not take it for damaged.

    Args:
        path: The file or folder.
        may_lack: Whether the bucket may answer that it has no such file; when writing, that is the bucket itself.

    Raises:
        StorageError: When the bucket fails in any other way.
    """
    try:
        yield
    except (OSError, pa.ArrowException, ImportError, ValueError) as error:
        if not isinstance(path, BucketPath) or (may_lack and isinstance(error, FileNotFoundError)):
            raise
        fault = " ".join(str(error).split())[:300]
        raise StorageError(f"{path}: {fault}; submit the same run name again once it can be reached") from None


def explain(error: OSError) -> str:
    """What went wrong in a few words; Arrow's errors have no `strerror`."""
    return error.strerror or " ".join(str(error).split())[:300]


def write_whole(path: StoredPath, content: bytes) -> None:
    """Writes a small file that is there as a whole or not at all, and outlives a crash of the machine."""
    if isinstance(path, BucketPath):
        path.write_bytes(content)
        return
    write_bytes(path, content)


def remove_tree(path: StoredPath) -> None:
    """Removes a folder with all that is in it, as far as it can be removed."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        filesystem, inner = path.open_arrow()
        filesystem.delete_dir(inner)
    except (OSError, pa.ArrowException):  # an unfinished checkpoint that stays costs space and nothing else
        return
