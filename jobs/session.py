"""Opens what a run needs around its stages: Ray, the lineage, and a clean end for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jobs.run_folder import RunFolder
from jobs.stages import RunContext
from layerplan.config.run import RunConfig
from layerplan.ray_session import connect
from layerplan.tracking.tracker import open_tracker

DATA_CPUS = 0.25
"""A reading task must fit beside the training workers, or training would wait for data forever."""


@contextmanager
def open_run(config: RunConfig, folder: RunFolder) -> Iterator[RunContext]:
    """Connects to Ray, opens the parent run, and closes it as finished or failed."""
    train = config.train
    connect(
        config.cluster,
        min_cpus=train.num_workers * train.num_cpus_per_worker + DATA_CPUS,
        min_gpus=train.num_workers if train.use_gpu else 0,
    )
    tracker = open_tracker(config.tracking, folder.root, config.name)
    tracker.log_params({"seed": config.seed, "model": config.model.type, "plan": config.plan.type})
    try:
        yield RunContext(config, folder, tracker)
    except BaseException:
        tracker.close(status="FAILED")
        raise
    tracker.close(status="FINISHED")
