"""The ledger of what was trained on: one line per optimizer step with a hash of its row ids, rank 0 writes.

A step's line is written once its update was decided. After a resume, lines beyond the checkpoint are dropped first,
because those steps are taken again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from layerplan.artifacts import hash_bytes, write_text
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
        """Removes the lines of steps after `step`, atomically, and a last line cut short by a kill."""
        if not self._path.exists():
            return
        kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_text(self._path, "".join(line + "\n" for line in kept))

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


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
