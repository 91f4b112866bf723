"""The ledger of what was trained on: one line per optimizer step with a hash of its row ids, rank 0 writes.

A step's line is written once its update was decided. After a resume, lines beyond the checkpoint are dropped first,
because those steps are taken again.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from layerplan.artifacts import hash_bytes
from layerplan.errors import TrainingError


class LedgerWriter:
    """Appends to `ledger.jsonl`; every rank calls `write`, as the row ids of all ranks are gathered."""

    def __init__(
        self, path: Path, *, start_step: int, rank: int, world_size: int, group: dist.ProcessGroup | None = None
    ) -> None:
        """Drops what is behind `start_step`; `group` is one of hosts, so that no device is asked (default: all ranks')."""
        self._path = path
        self._group = group
        self._rank = rank
        self._world_size = world_size
        if rank == 0:
            self.drop_after(start_step)
        self._is_begun = path.exists()

    def drop_after(self, step: int) -> None:
        """Removes the lines of steps after `step`, and a last line cut short by a kill.

        Read from the end, in one cut: a ledger of a long run is hundreds of MB, of which a resume needs the last lines.
        """
        if not self._path.exists() or not self._path.stat().st_size:
            return
        with self._path.open("r+b") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as text:
            end = whole = len(text)
            while end:
                start = text.rfind(b"\n", 0, end - 1) + 1
                if text[end - 1 : end] == b"\n" and _step_of(text[start:end]) <= step:
                    break
                end = start
        if end < whole:
            os.truncate(self._path, end)

    def write(self, step: int, row_ids: NDArray[np.int64]) -> None:
        """Takes this rank's row ids of the 1-based `step`.

        Raises:
            TrainingError: When the file is gone: what would begin anew had only the steps from here on.
        """
        pieces: Sequence[NDArray[np.int64] | None] = [row_ids]
        if self._world_size > 1:
            pieces = [None] * self._world_size
            dist.all_gather_object(pieces, row_ids, group=self._group)
        if self._rank == 0:
            ids = np.sort(np.concatenate([piece for piece in pieces if piece is not None]))
            line = {"step": step, "num_rows": len(ids), "sha256": hash_row_ids(ids), "row_ids": ids.tolist()}
            if self._is_begun and not self._path.exists():
                raise TrainingError(f"{self._path}: was removed while the run went on; its earlier steps would be lost")
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
            self._is_begun = True


def hash_row_ids(row_ids: NDArray[np.int64]) -> str:
    """SHA-256 over the sorted row ids as little-endian int64, the same for every world size."""
    return hash_bytes(np.sort(row_ids).astype("<i8").tobytes())


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
