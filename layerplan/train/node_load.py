"""How busy the node of a worker is; apart from the loop, which needs no more than torch."""

from __future__ import annotations

import psutil


class NodeLoad:
    """How busy the node of this process is, from one asking to the next."""

    def __init__(self) -> None:
        psutil.cpu_percent()

    def read(self) -> tuple[float, float, float]:
        """Percent of the CPUs since the last time, megabytes in use, and percent of the memory."""
        memory = psutil.virtual_memory()
        return psutil.cpu_percent(), memory.used / 1e6, 100 * memory.used / memory.total
