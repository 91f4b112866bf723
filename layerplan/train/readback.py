"""Numbers on their way from the device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Readback:
    """Scalars copied while the device goes on; whoever reads them waits for their copy and nothing behind it."""

    def __init__(self, *scalars: Tensor) -> None:
        """Begins to copy float32 scalars of one device."""
        values = torch.stack([scalar.detach() for scalar in scalars])
        self._copied: Any = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host = host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = values

    def read(self) -> list[float]:
        """The values, in order."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._host.numpy().tolist()
        return values
