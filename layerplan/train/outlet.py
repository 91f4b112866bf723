"""Where a worker takes its base from and what it tells while it trains, so that one process can train many plans."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerplan.models.ref import ModelRef
from layerplan.storage.paths import StoredPath
from layerplan.train.checkpoint_writer import Publish, publish_to_ray
from layerplan.train.state import TrainState

logger = logging.getLogger(__name__)

COPIES = 3
"""Times the base must fit into free memory for a copy of it to be kept: the copy, the model that trains, and room for it."""


@dataclass(frozen=True)
class Outlet:
    """What a training has beside its request."""

    publish: Publish = publish_to_ray
    """What finishes its checkpoints."""
    load: Callable[[ModelRef], nn.Module] = ModelRef.load
    """Gives its base."""
    tell: Callable[[dict[str, Any]], None] = lambda values: None
    """Takes what is measured on the way, on rank 0."""


ALONE = Outlet()
"""Of a process that trains one plan, for Ray Train."""


class Background:
    """Finishes checkpoints in a thread, in order."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="layerplan-checkpoints")
        self._last: Future[None] | None = None

    def __call__(
        self, state: TrainState, folder: StoredPath, finish: Callable[[], None], *, is_validated: bool
    ) -> None:
        """Has the save finished behind those before it."""
        self._last = self._pool.submit(finish)

    def wait(self) -> None:
        """Returns once all are finished; raises what the last one met."""
        if self._last is not None:
            self._last.result()


class KeptBase:
    """A base that is read once and copied for every training; read anew where memory has no room for that."""

    def __init__(self) -> None:
        self._kept: dict[ModelRef, nn.Module] = {}

    def __call__(self, model: ModelRef) -> nn.Module:
        """A model that the caller may change."""
        if model not in self._kept:
            loaded = model.load()
            if not _has_room(loaded):
                return loaded
            self._kept = {model: loaded}
        return copy.deepcopy(self._kept[model])


def _has_room(model: nn.Module) -> bool:
    import psutil

    size = sum(value.numel() * value.element_size() for value in model.parameters())
    return COPIES * size < psutil.virtual_memory().available
