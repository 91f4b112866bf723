"""States of rows in one file: a record of a fixed size for each row, which proves itself when it is read.

Workers of one run write into the same file where they share a folder, each the rows it computed. A record that was torn,
never written, or made under other circumstances is no record. A folder of one's own just holds fewer of them.
Shapes: T tokens, D hidden.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from layerplan.plan.prefix_cache import RECORD_HEAD_BYTES

logger = logging.getLogger(__name__)

_WAITING = 4
"""Micro-batches that may lie there to be written."""


class RowStates:
    """Reads states of rows, and writes them in a thread; a disk that fails ends the writing and nothing else."""

    def __init__(self, path: Path, *, circumstances: str, row_shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Opens the file, or makes it.

        Args:
            path: Of the file.
            circumstances: Whatever decides the bits of a state beside its row; records of others are none.
            row_shape: (T, D).
            dtype: Of the states.

        Raises:
            OSError: When it cannot be opened.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._shape, self._dtype = path, row_shape, dtype
        self._circumstances = circumstances
        self._num_bytes = row_shape[0] * row_shape[1] * dtype.itemsize
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._queue: queue.Queue[Any] = queue.Queue(_WAITING)
        self._writes = True
        self._thread = threading.Thread(target=self._run, name="layerplan-states", daemon=True)
        self._thread.start()

    def read(self, row_ids: NDArray[np.int64], beside: str) -> Tensor | None:
        """States (B, T, D) of rows in a CPU tensor, or None when one of them is missing.

        Args:
            row_ids: (B,).
            beside: What the micro-batch adds to the circumstances.
        """
        states = torch.empty((len(row_ids), *self._shape), dtype=self._dtype)
        buffers = states.view(torch.uint8).flatten(1).numpy()
        for row_id, buffer in zip(row_ids.tolist(), buffers, strict=True):
            if not self._read_one(row_id, buffer, beside):
                return None
        return states

    def write(self, row_ids: NDArray[np.int64], states_BTD: Tensor, beside: str) -> None:
        """Hands states over to be written; waits while too many are waiting."""
        if self._writes:
            self._queue.put((row_ids, states_BTD.detach(), beside))

    def flush(self) -> None:
        """Waits until all that was handed over is written."""
        self._queue.join()

    def close(self) -> None:
        """Ends the thread, after what was handed over, and closes the file."""
        self._queue.put(None)
        self._thread.join()
        os.close(self._file)

    def _read_one(self, row_id: int, buffer: NDArray[np.uint8], beside: str) -> bool:
        place = row_id * (RECORD_HEAD_BYTES + self._num_bytes)
        try:
            head = os.pread(self._file, RECORD_HEAD_BYTES, place)
            count = os.preadv(self._file, [buffer.data], place + RECORD_HEAD_BYTES)
        except OSError:
            return False
        return count == self._num_bytes and head == self._seal(row_id, buffer, beside)

    def _seal(self, row_id: int, content: Any, beside: str) -> bytes:
        seed = sha256(f"{self._circumstances}\n{beside}\n{row_id}".encode()).digest()[:8]
        return xxhash.xxh3_128(content, seed=int.from_bytes(seed, "big")).digest()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._writes:
                    self._write_all(*item)
            except OSError as error:
                self._writes = False
                logger.warning("prefix cache: nothing more is written (%s: %s)", self.path, error.strerror or error)
            finally:
                del item
                self._queue.task_done()
        self._queue.task_done()

    def _write_all(self, row_ids: NDArray[np.int64], states_BTD: Tensor, beside: str) -> None:
        contents = states_BTD.to("cpu").contiguous().view(torch.uint8).flatten(1).numpy()
        for row_id, content in zip(row_ids.tolist(), contents, strict=True):
            place = row_id * (RECORD_HEAD_BYTES + self._num_bytes)
            record = self._seal(row_id, content, beside) + content.tobytes()
            while record:
                written = os.pwrite(self._file, record, place)
                record, place = record[written:], place + written
