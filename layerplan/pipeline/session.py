"""Opens what a run needs around its stages: Ray, the lineage, and a clean end for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from layerplan.config.run import RunConfig
from layerplan.errors import StorageError
from layerplan.pipeline.lineage import note_config
from layerplan.pipeline.run_folder import locate_run_folder, open_run_folder
from layerplan.pipeline.run_lease import hold_run
from layerplan.pipeline.stages import RunContext, say
from layerplan.ray_session import connect
from layerplan.run_folder import RunFolder
from layerplan.storage.working import find_home
from layerplan.tracking.address import describe_address
from layerplan.tracking.background import locate_store
from layerplan.tracking.outbox import Status
from layerplan.tracking.tracker import Tracker, open_tracker, status_of
from layerplan.train.compute_dtype import settle_dtype

DATA_CPUS = 0.25
"""A reading task must fit beside the training workers, or training would wait for data forever."""


@contextmanager
def open_run(config: RunConfig, *, trains: bool = True) -> Iterator[RunContext]:
    """Takes the run's lease and folder, connects to Ray, opens the parent run, and closes it as finished or failed.

    Args:
        config: The run's config.
        trains: Whether training workers must fit, and the engines that score beside them; else the engines alone.

    Raises:
        RunBusyError: When another process runs it.
        ConfigError: When the folder belongs to another config or cannot be written.
    """
    with hold_run(find_home(locate_run_folder(config).root), config.name):
        yield from _open(config, trains)


def _open(config: RunConfig, trains: bool) -> Iterator[RunContext]:
    folder = open_run_folder(config)
    train, evaluation = config.train, config.evaluation
    workers = train.fewest_workers if trains else 0
    engines = evaluation.num_actors if not trains or evaluation.score_every_steps is not None else 0
    connect(
        config.cluster,
        min_cpus=workers * train.num_cpus_per_worker + DATA_CPUS + engines * evaluation.num_cpus_per_actor,
        min_gpus=(workers if train.use_gpu else 0) + engines * evaluation.num_gpus_per_actor,
    )
    train, measured = settle_dtype(train, folder.compute_dtype)
    if measured is not None:
        say("train", str(measured))
    config = config.model_copy(update={"train": train})
    if folder.mirror is not None and config.tracking.backend == "mlflow" and config.tracking.uri is None:
        say("tracking", f"the lineage stays on this machine, in {folder.root.parent}; set tracking.uri")
    tracker = open_tracker(config.tracking, folder.root, config.name, lambda line: say("tracking", line))
    note_config(tracker, config)
    status: Status = "FINISHED"
    try:
        yield RunContext(config, folder, tracker)
    except BaseException as error:
        status = status_of(error)
        with suppress(StorageError):  # what the run failed with is to be told
            _close(tracker, status, config, folder)
        raise
    _close(tracker, status, config, folder)


def _close(tracker: Tracker, status: Status, config: RunConfig, folder: RunFolder) -> None:
    tracker.close(status=status)
    _print_address(config, folder)
    folder.carry()


def _print_address(config: RunConfig, folder: RunFolder) -> None:
    if config.tracking.backend != "mlflow":
        return
    address = describe_address(locate_store(config.tracking, folder.root), folder.root)
    if address is not None:
        print(f"lineage   {address}", flush=True)
