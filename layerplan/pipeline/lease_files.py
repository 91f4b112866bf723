"""The files of a run folder's lease, on a disk or in a bucket: one per holder, each whole or not there."""

from __future__ import annotations

from pathlib import Path

import pyarrow.fs as pafs

from layerplan.aside import write_bytes
from layerplan.run_folder import LEASE_PREFIX, LEASE_SUFFIX
from layerplan.storage.address import is_address, join_location, open_filesystem
from layerplan.storage.paths import BucketPath, StoredPath


class LeaseFiles:
    """The holders' files directly in a run folder."""

    def __init__(self, root: StoredPath | str) -> None:
        self._root = str(root)
        self._filesystem, self._inner = root.open_arrow() if isinstance(root, BucketPath) else open_filesystem(root)
        if not is_address(self._root):
            self._filesystem.create_dir(self._inner, recursive=True)

    def locate(self, owner: str) -> str:
        """Where the file of a holder lies, for messages."""
        return join_location(self._root, _name(owner))

    def list_owners(self) -> list[str]:
        """Holders that have a file, sorted."""
        infos = self._filesystem.get_file_info(pafs.FileSelector(self._inner, allow_not_found=True))
        names = [info.base_name for info in infos if info.type == pafs.FileType.File]
        return sorted(owner for name in names if (owner := _parse(name)) is not None)

    def read(self, owner: str) -> str | None:
        """The file's text; None when there is none."""
        try:
            with self._filesystem.open_input_stream(self._place(_name(owner))) as stream:
                return bytes(stream.read()).decode(errors="replace")
        except FileNotFoundError:
            return None

    def write(self, owner: str, text: str) -> None:
        """Puts the file in place at once: a bucket does so by itself, a disk by a move."""
        place = self._place(_name(owner))
        if not is_address(self._root):
            write_bytes(Path(place), text.encode())
            return
        with self._filesystem.open_output_stream(place) as stream:
            stream.write(text.encode())

    def remove(self, owner: str) -> None:
        """Removes the file, if there is one."""
        try:
            self._filesystem.delete_file(self._place(_name(owner)))
        except FileNotFoundError:
            return

    def _place(self, name: str) -> str:
        return f"{self._inner}/{name}"


def _name(owner: str) -> str:
    return f"{LEASE_PREFIX}{owner}{LEASE_SUFFIX}"


def _parse(name: str) -> str | None:
    """The holder whose file has this name."""
    is_lease = name.startswith(LEASE_PREFIX) and name.endswith(LEASE_SUFFIX)
    return name[len(LEASE_PREFIX) : -len(LEASE_SUFFIX)] if is_lease else None
