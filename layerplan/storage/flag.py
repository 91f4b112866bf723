"""An empty file that one process makes and another looks for, on one machine or through the bucket."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from layerplan.errors import StorageError
from layerplan.storage.paths import BucketPath
from layerplan.storage.working import find_home

LOOK_EVERY_S = 2.0
"""How often the bucket is asked: a request takes longer than a small step of training."""


@dataclass
class Flag:
    """Such a file; the part of `pathlib.Path` that is used of it."""

    path: Path
    _looked: float = field(default=-LOOK_EVERY_S, compare=False)
    _seen: bool = field(default=False, compare=False)

    def touch(self) -> None:
        """Makes it, here and in the bucket; a bucket that does not answer leaves it here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        home = find_home(self.path)
        if isinstance(home, BucketPath):
            with suppress(StorageError):
                home.touch()

    def exists(self) -> bool:
        """Whether it is here, or was in the bucket when that was asked last."""
        if self.path.exists():
            return True
        home = find_home(self.path)
        if isinstance(home, BucketPath) and time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            with suppress(StorageError):
                self._seen = home.exists()
        return self._seen

    def unlink(self) -> None:
        """Removes it on both sides."""
        self.path.unlink(missing_ok=True)
        home = find_home(self.path)
        if isinstance(home, BucketPath):
            with suppress(StorageError):
                home.unlink(missing_ok=True)
        self._seen = False
