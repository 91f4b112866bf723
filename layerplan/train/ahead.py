"""The rows of coming steps, made into batches and sent to the device before their step begins.

A thread reads rows, gives them labels and copies them while the device computes; what is not needed after all, because
training goes back to a checkpoint, is given out again.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from layerplan.corpus.rows import PackedRows
from layerplan.train.step import TensorBatch

DEPTH = 2
"""Steps that are prepared beyond the one being taken."""


@dataclass(frozen=True)
class PreparedStep:
    """One rank's rows of one optimizer step, as micro-batches on its device."""

    rows: PackedRows
    batches: list[TensorBatch]
    is_copied: Any = None
    """CUDA event after the copies; None on a CPU."""

    def wait(self) -> None:
        """Makes the device's current stream wait for the copies; the host goes on."""
        if self.is_copied is None:
            return
        stream = torch.cuda.current_stream()
        stream.wait_event(self.is_copied)
        for batch in self.batches:
            for tensor in batch.tensors:
                tensor.record_stream(stream)


class StepsAhead:
    """Gives out prepared steps in order; a context manager that ends its thread."""

    def __init__(
        self,
        iter_steps: Callable[[int, int], Iterator[PackedRows]],
        make_batches: Callable[[PackedRows], list[TensorBatch]],
        device: torch.device,
        *,
        start: int,
        stop: int,
        depth: int = DEPTH,
    ) -> None:
        """Begins to prepare.

        Args:
            iter_steps: (start, stop) in the data order to this rank's rows of each step; called in the thread.
            make_batches: Rows to micro-batches on the device.
            device: Where they go.
            start: First step of the data order.
            stop: The one after the last.
            depth: Steps that may lie prepared.
        """
        self._iter_steps = iter_steps
        self._make_batches = make_batches
        self._device = device
        self._depth = depth
        self._again: deque[PreparedStep] = deque()
        self._left = 0
        self._last = start
        self._stop = stop
        self._begin()

    def take(self) -> PreparedStep:
        """The next step; waits until it is prepared. Errors of the thread are raised here.

        Raises:
            IndexError: When all were given out.
        """
        if self._again:
            return self._again.popleft()
        if self._left == 0 and self._stop > self._last:
            self._begin()
        if self._left == 0:
            raise IndexError("no step is left")
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._left = 0
            raise item
        self._left -= 1
        return item

    def put_back(self, steps: Sequence[PreparedStep]) -> None:
        """Gives these out again, in their order, before any other."""
        self._again.extendleft(reversed(steps))

    def extend(self, stop: int) -> None:
        """Goes on to a later last step, once all before it were given out."""
        self._stop = max(stop, self._stop)

    def _begin(self) -> None:
        start, self._last = self._last, self._stop
        self._left = self._last - start
        self._is_over = threading.Event()
        self._ready: queue.Queue[PreparedStep | BaseException] = queue.Queue(self._depth)
        self._thread = threading.Thread(
            target=self._run, args=(start, self._last, self._ready, self._is_over), name="layerplan-rows", daemon=True
        )
        self._thread.start()

    def _run(self, start: int, stop: int, ready: queue.Queue[Any], is_over: threading.Event) -> None:
        try:
            with self._side_stream():
                rows_of_steps = self._iter_steps(start, stop)
                for _ in range(start, stop):
                    if not _put(ready, self._prepare(next(rows_of_steps)), is_over):
                        return
        except BaseException as error:
            _put(ready, error, is_over)

    def _side_stream(self) -> Any:
        if self._device.type != "cuda":
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # makes the device current in this thread too

    def _prepare(self, rows: PackedRows) -> PreparedStep:
        batches = self._make_batches(rows)
        if self._device.type != "cuda":
            return PreparedStep(rows, batches)
        is_copied = torch.cuda.Event()
        is_copied.record()
        return PreparedStep(rows, batches, is_copied)

    def __enter__(self) -> StepsAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join(timeout=60)


def _put(ready: queue.Queue[Any], item: object, is_over: threading.Event) -> bool:
    """Whether the item was put; False once nobody takes any more."""
    while not is_over.is_set():
        try:
            ready.put(item, timeout=0.2)
        except queue.Full:
            continue
        return True
    return False
