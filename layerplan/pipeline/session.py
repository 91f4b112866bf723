"""Opens what a run needs around its stages: Ray, the lineage, and a clean end for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from layerplan.config.run import RunConfig
from layerplan.errors import StorageError
from layerplan.pipeline.demands import ask_for_training
from layerplan.pipeline.failure import noting_failure
from layerplan.pipeline.lineage import note_config
from layerplan.pipeline.run_folder import locate_run_folder, open_run_folder
from layerplan.pipeline.run_lease import hold_run
from layerplan.pipeline.stages import RunContext, say
from layerplan.ray_session import connect
from layerplan.run_folder import RunFolder
from layerplan.sharing.books import read_nodes
from layerplan.sharing.demand import Demand, sum_up
from layerplan.sharing.fit import check_fit
from layerplan.sharing.turn import holding_turn
from layerplan.storage.working import find_home
from layerplan.tracking.address import describe_address
from layerplan.tracking.background import locate_store
from layerplan.tracking.outbox import Status
from layerplan.tracking.tracker import Tracker, open_tracker, status_of
from layerplan.train.compute_dtype import settle_dtype

Ask = Callable[[RunConfig], list[Demand]]
"""What a command holds at once, and what else it will hold later."""


@contextmanager
def open_run(config: RunConfig, ask: Ask = ask_for_training, *later: Ask) -> Iterator[RunContext]:
    """Takes the run's lease and folder, connects to Ray, waits for its turn, opens the parent run, and closes it.

    Args:
        config: The run's config.
        ask: What it holds at once, for which it waits in line.
        later: What else it will place; whether the cluster could hold that is looked at beforehand.

    Raises:
        RunBusyError: When another process runs it.
        ConfigError: When the folder belongs to another config or cannot be written.
        ClusterError: When the cluster cannot be reached, or never hold what is asked for.
    """
    with hold_run(find_home(locate_run_folder(config).root), config.name) as lease:
        folder = open_run_folder(config)
        demands = [demand for other in later for demand in other(config)]
        with noting_failure(folder), on_cluster(config, ask(config), demands, tell=lease.tell):
            yield from _open(config, folder)


@contextmanager
def on_cluster(
    config: RunConfig, demands: list[Demand], later: Sequence[Demand] = (), *, tell: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Connects to Ray and waits for the run's turn there.

    Args:
        config: The run's config.
        demands: What it holds at once, for which it waits in line.
        later: What else it will place.
        tell: Takes its place in the line whenever that is said, and nothing once its turn has come.

    Raises:
        ClusterError: When the cluster cannot be reached, or never hold what is asked for.
    """
    total = sum_up(demands)
    connect(config.cluster, min_cpus=total.get("CPU", 0.0), min_gpus=total.get("GPU", 0.0))
    check_fit([*demands, *later], read_nodes())
    with holding_turn(config.cluster, config.name, demands, tell=tell):
        yield


def _open(config: RunConfig, folder: RunFolder) -> Iterator[RunContext]:
    train, measured = settle_dtype(config.train, folder.compute_dtype)
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
