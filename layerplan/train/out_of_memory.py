"""When memory has run out: PyTorch has an error for GPUs, and only words for CPUs."""

from __future__ import annotations

import torch

from layerplan.errors import TrainingError

_CPU_ALLOCATOR = "DefaultCPUAllocator"


class OutOfMemoryError(TrainingError):
    """A step did not fit into memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
