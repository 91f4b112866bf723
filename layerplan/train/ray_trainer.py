"""Ray Train's own trainer over a run's workers: how many there are, what each reserves, and where Ray keeps its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from layerplan.config.train import TrainConfig
from layerplan.ray_access import list_loopback_variables
from layerplan.storage.paths import BucketPath, StoredPath

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
ELASTIC_START_S = 20.0
"""For room to be there, not for processes to start."""


def make_torch_trainer(
    train_fn: Callable[[dict[str, Any]], None],
    loop_config: dict[str, Any],
    config: TrainConfig,
    *,
    name: str,
    folder: StoredPath,
    max_failures: int,
    env: Mapping[str, str],
    callbacks: Sequence[Any] = (),
    validation_config: Any = None,
) -> Any:
    """Ray Train's trainer over a run's workers.

    Args:
        train_fn: What every worker calls, with `loop_config`.
        loop_config: Travels to the workers.
        config: How many workers there are, and what they reserve.
        name: Of Ray Train's own folder below `folder`.
        folder: Where Ray Train keeps its own files.
        max_failures: Times the workers are started again; -1 for as often as it takes.
        env: Environment variables of the workers.
        callbacks: `UserCallback`s for the controller.
        validation_config: What is done with checkpoints beside training.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    from layerplan.train.rendezvous import choose_torch_config
    from layerplan.train.replica_placement import make_scaling

    trainer = TorchTrainer(
        train_fn,
        train_loop_config=loop_config,
        torch_config=choose_torch_config("cpu:gloo,cuda:nccl" if config.use_gpu else "gloo"),
        scaling_config=make_scaling(config, describe_workers(config), describe_worker(config)),
        run_config=ray.train.RunConfig(
            name=name,
            **_describe_storage(folder),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", **list_loopback_variables(), **env}},
        ),
        validation_config=validation_config,
    )
    # Ray Train's own handler of Ctrl-C ends the process without a word, and stays after training: what is scored then goes
    # on to its end, or ends with status 0.
    trainer._register_sigint_handler = lambda controller: None
    return trainer


@contextmanager
def deciding_anew(config: TrainConfig) -> Iterator[None]:
    """Lets Ray Train wait only shortly for the room of a range of workers, or for nodes that were chosen for replicas.

    It decides by what it knew of the cluster up to 20 s ago, so that after a node was lost it asks for a worker too many.
    """
    if isinstance(config.num_workers, int) and (
        config.num_replicas == 1 or config.placement not in ("auto", "strict_pack")
    ):
        yield
        return
    earlier = os.environ.get(START_TIMEOUT)
    os.environ[START_TIMEOUT] = str(min(float(earlier or ELASTIC_START_S), ELASTIC_START_S))
    try:
        yield
    finally:
        os.environ.pop(START_TIMEOUT)
        if earlier is not None:
            os.environ[START_TIMEOUT] = earlier


def describe_workers(config: TrainConfig) -> dict[str, Any]:
    """How many workers there are, as Ray Train takes it."""
    if isinstance(config.num_workers, int):
        return {"num_workers": config.num_workers}
    counts = (config.fewest_workers, config.most_workers)
    return {"num_workers": counts, "elastic_resize_monitor_interval_s": config.num_workers.resize_every}


def describe_worker(config: TrainConfig) -> dict[str, float]:
    """What one worker reserves on Ray."""
    return {"CPU": config.num_cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}


def _describe_storage(folder: StoredPath) -> dict[str, Any]:
    """Where Ray Train keeps its own files; a file system that is opened here travels without keys."""
    if isinstance(folder, BucketPath):
        filesystem, inner = folder.open_arrow()
        return {"storage_path": inner, "storage_filesystem": filesystem}
    return {"storage_path": str(folder)}
