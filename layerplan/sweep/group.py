"""A Ray Train run that trains one trial after the other: its workers are started once."""

from __future__ import annotations

import logging
import shutil
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

import layerplan.errors
from layerplan.config.train import TrainConfig
from layerplan.errors import LayerplanError, TrainingError, find_layerplan_error, first_line
from layerplan.run_folder import WORKERS_PREFIX
from layerplan.train.ray_trainer import make_torch_trainer
from layerplan.train.relay import WAIT_S, Relay
from layerplan.train.request import TrainRequest
from layerplan.train.watchdog import watching_stalls

logger = logging.getLogger(__name__)

_ENDS_WITHIN_S = 60.0
AS_OFTEN_AS_IT_TAKES = -1
"""Ray Train starts the workers again; the relay counts for each trial how often."""


class TrainingGroup:
    """Workers that wait for trainings; close it to free what they hold."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._own = ExitStack()
        self._board = self._own.enter_context(watching_stalls(folder, config.stall_timeout))
        self._relay = ray.remote(num_cpus=0, max_concurrency=64)(Relay).remote()
        self._name = WORKERS_PREFIX + uuid.uuid4().hex[:8]
        self._folder = folder
        self._number = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, args=(config,), name="layerplan-workers", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether its workers are there or being started."""
        return self._thread.is_alive()

    def train(self, request: TrainRequest, report: Callable[[dict[str, Any]], None]) -> None:
        """Trains one request and returns when that has ended.

        Args:
            request: What to train.
            report: Called with what is measured on the way.

        Raises:
            LayerplanError: What the training ended with.
        """
        self._number += 1
        number, heard = self._number, 0
        offered = self._relay.offer.remote(number, replace(request, board=self._board), request.config.max_failures)
        ray.get(offered)
        while True:
            for kind, value in (told := ray.get(self._relay.listen.remote(number, heard))):
                if kind == "report":
                    report(value)
                elif kind == "done":
                    return
                else:
                    name, args = value
                    raise getattr(layerplan.errors, name)(*args)
            heard += len(told)
            if not self.is_alive:
                raise _explain(self._error)

    def close(self) -> None:
        """Lets the workers go; returns when they have."""
        with suppress(ray.exceptions.RayError):
            ray.get(self._relay.close.remote(), timeout=WAIT_S)
        self._thread.join(timeout=_ENDS_WITHIN_S)
        with suppress(ray.exceptions.RayError):
            ray.kill(self._relay)
        self._own.close()
        shutil.rmtree(self._folder / self._name, ignore_errors=True)

    def _fit(self, config: TrainConfig) -> None:
        trainer = make_torch_trainer(
            _serve,
            {"relay": self._relay},
            config,
            name=self._name,
            folder=self._folder,
            max_failures=AS_OFTEN_AS_IT_TAKES,
            env={},
        )
        try:
            self._error = trainer.fit().error
        except Exception as error:  # the trial that waits for it is told
            self._error = error


def _serve(loop_config: dict[str, Any]) -> None:
    """The train function; the driver loads it too, and needs none of the model code it imports."""
    from layerplan.train.serve import serve

    serve(loop_config["relay"])


def _explain(error: BaseException | None) -> LayerplanError:
    if error is None:
        return TrainingError("training failed: its workers ended")
    fault = find_layerplan_error(error)
    return type(fault)(*fault.args) if fault is not None else TrainingError(f"training failed: {first_line(error)}")
