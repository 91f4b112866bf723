"""A working folder and the bucket it stands for: files are fetched when a run opens, carried when they are complete.

The bucket is the truth: what it has replaces what is here, except lines that were appended here to the ones it has. A file
is the same on both sides when size and time are, which is why both ways of copying give the local file the time of the one
in the bucket. Every function does nothing for a path that is no part of a working folder.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pyarrow.fs as pafs

from layerplan.aside import is_partial, move_into_place, name_aside
from layerplan.run_folder import (
    CHECKPOINTS_NAME,
    LEASE_PREFIX,
    LEDGER_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    PREFIX_CACHE_NAME,
    SENDER_LOCK_NAME,
    STOP_REQUEST,
    STORE_NAME,
    STREAM_NAME,
)
from layerplan.storage.paths import BucketFile, BucketPath, reaching
from layerplan.storage.working import find_home, make_private

GROWING = (METRICS_NAME, LEDGER_NAME)
"""Files that grow while training; whoever appends to them carries them, with every checkpoint."""
_OWN_WAY = {CHECKPOINTS_NAME: (), PREFIX_CACHE_NAME: (), STORE_NAME: (MANIFEST_NAME, STREAM_NAME)}
"""Folders whose files are written to the bucket directly, each with those of its files that are mirrored all the same."""
_DEPTH = 2
"""They lie in the run's folder or in one of a stage there."""
_LOCAL_NAMES = (STOP_REQUEST, SENDER_LOCK_NAME)
_SMALL_BYTES = 4 << 20
"""Up to this size a file is sent as it was read at once: other processes may be writing it."""
_THREADS = 8
_CARRYING = threading.Lock()
_Stamp = tuple[int, int]
"""Size in bytes and time in ns."""


class Mirror:
    """The driver's hold on a run's working folder; knows what was the same on both sides when it last looked."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, _Stamp] = {}

    def fetch(self) -> None:
        """Brings what the bucket has; what is here alone stays, to be carried.

        Raises:
            StorageError: When the bucket cannot be read.
        """
        self._known |= _fetch(self._root, _is_mirrored)

    def carry(self) -> None:
        """Brings what is new or changed here to the bucket, in the order it was written; removes nothing there.

        In that order a file which says that others are complete comes after them there too.

        Raises:
            StorageError: When the bucket refuses or does not hold what was sent.
        """
        home = find_home(self._root)
        if not isinstance(home, BucketPath):
            return
        here = {name: stamp for name, stamp in _list_here(self._root).items() if _is_carried(name)}
        changed = [name for name, stamp in here.items() if self._known.get(name) != stamp]
        for name in sorted(changed, key=lambda name: (here[name][1], name)):
            sent = _carry(self._root / name, home / name)
            if sent is not None:
                self._known[name] = sent


def fetch_folder(folder: Path) -> None:
    """Brings what the bucket has below a folder; any process of any node may call it, several at once.

    Raises:
        StorageError: When the bucket cannot be read.
    """
    _fetch(folder, _is_whole)


def carry_folder(folder: Path) -> None:
    """Brings what the bucket lacks of a folder there, in the order it was written."""
    home = find_home(folder)
    if isinstance(home, BucketPath):
        there = {file.name: (file.size, file.time_ns) for file in home.list_files()}
        here = {name: stamp for name, stamp in _list_here(folder).items() if _is_whole(name)}
        changed = [name for name, stamp in here.items() if there.get(name) != stamp]
        for name in sorted(changed, key=lambda name: (here[name][1], name)):
            _carry(folder / name, home / name)


def fetch_file(path: Path) -> None:
    """Makes a file here what it is in the bucket; one that is not there is left alone."""
    home = find_home(path)
    if not isinstance(home, BucketPath):
        return
    make_private(path.parent)
    with reaching(home):
        filesystem, inner = home.open_arrow()
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.File:
            _download(filesystem, BucketFile(path.name, inner, info.size, info.mtime_ns), path)


def carry_file(path: Path) -> None:
    """Brings a file as it is now to the bucket; of one that is being appended to, the whole lines."""
    home = find_home(path)
    if not isinstance(home, BucketPath) or not path.exists():
        return
    with _CARRYING:  # an upload thread and the loop carry the same file: the later content must arrive later
        home.write_bytes(_read_whole(path))


def _fetch(folder: Path, is_wanted: Callable[[str], bool]) -> dict[str, _Stamp]:
    home = find_home(folder)
    if not isinstance(home, BucketPath):
        return {}
    make_private(folder)
    with reaching(home, may_lack=False):
        filesystem, _ = home.open_arrow()
        found = [file for file in home.list_files() if is_wanted(file.name)]
        todo = [file for file in found if _stamp(folder / file.name) != (file.size, file.time_ns)]
        with ThreadPoolExecutor(max_workers=_THREADS) as pool:
            list(pool.map(lambda file: _download(filesystem, file, folder / file.name), todo))
    return {file.name: (file.size, file.time_ns) for file in found}


def _list_here(folder: Path) -> dict[str, _Stamp]:
    found: dict[str, _Stamp] = {}
    for path in folder.rglob("*"):
        stamp = _stamp(path) if path.is_file() else None
        if stamp is not None:
            found[path.relative_to(folder).as_posix()] = stamp
    return found


def _is_whole(relative: str) -> bool:
    path = PurePosixPath(relative)
    return not is_partial(path) and ".." not in path.parts


def _is_mirrored(relative: str) -> bool:
    *folders, name = PurePosixPath(relative).parts
    own_way = next((part for part in folders[:_DEPTH] if part in _OWN_WAY), None)
    is_lease = not folders and name.startswith(LEASE_PREFIX)  # its holder alone writes it, to the bucket directly
    stays = name in _LOCAL_NAMES or is_lease
    return _is_whole(relative) and not stays and (own_way is None or name in _OWN_WAY[own_way])


def _is_carried(relative: str) -> bool:
    return _is_mirrored(relative) and PurePosixPath(relative).name not in GROWING


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _download(filesystem: pafs.FileSystem, file: BucketFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = name_aside(path, is_shared=True)
    try:
        pafs.copy_files(
            file.inner,
            str(partial),
            source_filesystem=filesystem,
            destination_filesystem=pafs.LocalFileSystem(),
            use_threads=False,
        )
        os.utime(partial, ns=(file.time_ns, file.time_ns))
        if not _continues(path, partial):
            move_into_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _continues(path: Path, earlier: Path) -> bool:
    """Whether a file of lines is another one with more lines: what a killed job wrote after it was last carried."""
    return path.suffix == ".jsonl" and path.exists() and path.read_bytes().startswith(earlier.read_bytes())


def _read_whole(path: Path) -> bytes:
    """A file's bytes; of lines that are being appended to, the whole ones."""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1] if path.suffix == ".jsonl" else content


def _carry(path: Path, home: BucketPath) -> _Stamp | None:
    """Copies a file to the bucket and gives it the time it has there; None when it is gone meanwhile."""
    before = _stamp(path)
    if before is None:
        return None
    with reaching(home, may_lack=False):
        filesystem, inner = home.open_arrow()
        sent = _send(path, before[0], home)
        info = filesystem.get_file_info(inner)
        if info.type != pafs.FileType.File or info.size != sent:
            raise OSError(f"{info.size} bytes arrived, {sent} were sent")
    if _stamp(path) == before:
        os.utime(path, ns=(info.mtime_ns, info.mtime_ns))
    return info.size, info.mtime_ns


def _send(path: Path, size: int, home: BucketPath) -> int:
    """Returns the number of bytes."""
    if size <= _SMALL_BYTES or path.suffix == ".jsonl":
        content = _read_whole(path)
        home.write_bytes(content)
        return len(content)
    filesystem, inner = home.open_arrow()
    pafs.copy_files(
        str(path),
        inner,
        source_filesystem=pafs.LocalFileSystem(),
        destination_filesystem=filesystem,
        use_threads=False,
    )
    return size
