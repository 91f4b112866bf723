"""A group of workers that trains one plan after the other, in processes that are started once.

Each reads its part of the base's files anew, which lie in the system's cache by then. A fault of ours ends the training and
then, on purpose, the process: another rank may be waiting in a collective, and Ray Train starts the group again.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train
import ray.train.torch

from layerplan.errors import LayerplanError
from layerplan.log import set_up_worker
from layerplan.train.outlet import Background, Outlet
from layerplan.train.request import TrainRequest
from layerplan.train.worker import forget_phase, run_worker


def serve(relay: Any) -> None:
    """Trains what the relay gives out until it is closed; inside Ray Train's train function.

    Raises:
        LayerplanError: What a training ended with, after the relay was told.
    """
    set_up_worker()
    rank = ray.train.get_context().get_world_rank()
    number = 0
    while (job := _take(relay, rank, number)) is not None:
        number, request = job
        _train(relay, number, request, rank)
        forget_phase(ray.train.torch.get_device())  # its graphs are in the compiler's own cache, if the next needs them


def _train(relay: Any, number: int, request: TrainRequest, rank: int) -> None:
    background = Background()
    outlet = Outlet(background, lambda values: ray.get(relay.tell.remote(number, "report", values)))
    try:
        run_worker(request, outlet)
        background.wait()
    except LayerplanError as error:
        ray.get(relay.tell.remote(number, "failed", (type(error).__name__, error.args)))
        raise
    if rank == 0:
        ray.get(relay.tell.remote(number, "done", None))


def _take(relay: Any, rank: int, after: int) -> tuple[int, TrainRequest] | None:
    while (answer := ray.get(relay.take.remote(rank, after))) == "wait":
        continue
    if answer == "close":
        return None
    number, request = answer
    return number, request
