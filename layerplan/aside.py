"""How a file or folder gets its name only once all of it is on the disk: the one place that writes aside.

A kill or a full disk leaves what was there before, or nothing; a power cut too, since the bytes are flushed to the disk
before the name is given. What grows by lines (metrics, journals, ledgers of answers) is appended to and not written here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

PARTIAL_SUFFIX = ".partial"
"""Of a file or folder that is being written, or was when its writer was killed."""


@contextmanager
def writing_aside(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to: flushed to disk and moved to `path` when the block ends, removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = name_aside(path)
    with _removing_on_failure(aside):
        yield aside
        move_into_place(aside, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file whole; its folder must be there, since one that was removed is not to come back by this."""
    aside = name_aside(path)
    with _removing_on_failure(aside):
        aside.write_bytes(content)
        move_into_place(aside, path)


@contextmanager
def writing_folder_aside(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which takes its place when the block ends, and vanishes when it fails.

    For a folder that one process writes; what a killed one left aside is cleared away.
    """
    aside = name_aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with _removing_on_failure(aside):
        yield aside
        _flush_files(aside)
        shutil.rmtree(path, ignore_errors=True)
        aside.replace(path)


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """An empty folder of this process alone, which becomes `path` when the block ends and vanishes when it fails.

    Where others make the same, the first to finish gives the folder and the rest is dropped. Its parent is scratch space
    that goes with it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        made = Path(work) / path.name
        made.mkdir()
        yield made
        _flush_files(made)
        try:
            made.rename(path)
        except OSError:
            if not path.is_dir():
                raise


def name_aside(path: Path, *, is_shared: bool = False) -> Path:
    """Where `path` is written to; a name of its own each time when several processes may write the same file."""
    return path.with_name(path.name + (f".{uuid.uuid4().hex[:12]}" if is_shared else "") + PARTIAL_SUFFIX)


def move_into_place(aside: Path, path: Path) -> None:
    """Flushes a file that was written aside to the disk and gives it its name."""
    _flush(aside)
    aside.replace(path)


def is_partial(path: PurePath) -> bool:
    """Whether a relative path is that of something half-written, or lies in it."""
    return any(part.endswith(PARTIAL_SUFFIX) for part in path.parts)


@contextmanager
def _removing_on_failure(aside: Path) -> Iterator[None]:
    try:
        yield
    except Exception:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
        raise


def _flush_files(folder: Path) -> None:
    for each in folder.rglob("*"):
        if each.is_file():
            _flush(each)


def _flush(path: Path) -> None:
    """Onto the disk itself, not only into the system's memory."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
