"""Plain replication: the whole model on every worker, gradients summed in buckets while backward still runs.

Only parameters the plan trains are ever communicated, in float32, so that the sum does not depend on bfloat16 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 * 2**20


class GradientReducer:
    """Averages gradients over all ranks; a bucket is sent as soon as the last of its gradients is there.

    Attributes:
        bytes_sent: Bytes handed to the collective in the newest synchronised step.
    """

    def __init__(self, parameters: Sequence[Tensor], world_size: int) -> None:
        self._world_size = world_size
        self._buckets = _fill_buckets(list(reversed(parameters)))
        self._bucket_of = {id(p): index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []
        self._in_flight: list[tuple[int, Tensor, Any]] = []
        self._next = 0
        self._enabled = False
        self.bytes_sent = 0
        self._handles = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in parameters]

    def close(self) -> None:
        """Takes the hooks off, for a plan that changes."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set_sync(self, enabled: bool) -> None:
        """Whether the next backward pass is the step's last, whose gradients are communicated."""
        self._enabled = enabled
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = 0
        if enabled:
            self.bytes_sent = 0

    def finish(self) -> None:
        """Waits for the sums and puts the means into `.grad`; call it after the last backward pass."""
        while self._next < len(self._buckets):
            self._send()
        for index, flat, work in self._in_flight:
            work.wait()
            flat /= self._world_size
            offset = 0
            for parameter in self._buckets[index]:
                piece = flat[offset : offset + parameter.numel()].view_as(parameter)
                offset += parameter.numel()
                if parameter.grad is not None:
                    parameter.grad.copy_(piece)
        self._in_flight.clear()

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._enabled:
            return
        self._missing[self._bucket_of[id(parameter)]] -= 1
        # in order, because every rank must issue the same collectives in the same order
        while self._next < len(self._buckets) and self._missing[self._next] <= 0:
            self._send()

    def _send(self) -> None:
        index, self._next = self._next, self._next + 1
        parts = [
            torch.zeros(p.numel(), device=p.device) if p.grad is None else p.grad.detach().float().reshape(-1)
            for p in self._buckets[index]
        ]
        flat = torch.cat(parts)
        self.bytes_sent += flat.numel() * flat.element_size()
        self._in_flight.append((index, flat, dist.all_reduce(flat, async_op=True)))


def _fill_buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for parameter in parameters:
        if buckets[-1] and size + 4 * parameter.numel() > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += 4 * parameter.numel()
    return buckets
