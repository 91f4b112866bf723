"""A token store that grows at an address while it is built, so that it may be larger than this disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow.fs as pafs

from layerplan.run_folder import MANIFEST_NAME
from layerplan.storage.address import BUCKETS, join_location, open_filesystem


class StoreUpload:
    """Copies files of a store to the address its readers will use.

    A file is there as a whole or not at all only where the file system says so (S3, GCS); readers are safe everywhere,
    because the manifest is copied last and nothing is read without it.

    Raises:
        OSError: From every method, when the address cannot be reached or refuses; `pyarrow.ArrowException` likewise.
    """

    def __init__(self, address: str) -> None:
        self.address = address

    def is_complete(self) -> bool:
        """Whether a finished store lies at the address."""
        return self._find_size(MANIFEST_NAME) is not None

    def list_names(self) -> set[str]:
        """Names of the files at the address, by one listing however many there are."""
        filesystem, inner = open_filesystem(self.address)
        infos = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
        return {info.base_name for info in infos if info.type == pafs.FileType.File}

    def copy(self, path: Path, name: str | None = None) -> None:
        """Copies a file below the address, under another name if one is given, and checks that all of it arrived."""
        name = name or path.name
        filesystem, inner = open_filesystem(join_location(self.address, name))
        if not self.address.startswith(tuple(f"{scheme}://" for scheme in BUCKETS)):  # a bucket has no folders to make
            filesystem.create_dir(inner.rpartition("/")[0], recursive=True)
        pafs.copy_files(str(path), inner, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
        there = self._find_size(name)
        if there != path.stat().st_size:
            raise OSError(f"{self.address}: {name} has {there} bytes after it was copied, {path.stat().st_size} here")

    def move(self, path: Path) -> None:
        """Copies a file and removes it here."""
        self.copy(path)
        path.unlink()

    def _find_size(self, name: str) -> int | None:
        filesystem, inner = open_filesystem(join_location(self.address, name))
        info = filesystem.get_file_info(inner)
        return info.size if info.type == pafs.FileType.File else None
