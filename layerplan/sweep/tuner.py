"""Ray Tune over the trials of a space: every trial is one training with its own plan, and an interrupted sweep continues.

Ray Tune's own state is not restored: what trials left says which have ended, and those that have not go on from their
checkpoints. With `asha`, trials that ended report again what they reported, in no time, so that others are judged by them.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerplan.config.sweep import SweepConfig
from layerplan.run_folder import TUNE_PREFIX, WORKERS_PREFIX
from layerplan.sweep.choosers import Chooser
from layerplan.sweep.objective import LOSS, PERCENT, Trial
from layerplan.sweep.room import DRIVER_CPUS
from layerplan.sweep.space import Point
from layerplan.train.request import TrainRequest
from layerplan.train.trial_record import TrialRecord

Begin = Callable[[Point], None]
End = Callable[[Point, dict[str, Any] | None], None]
logger = logging.getLogger(__name__)

_NOISY = ("ray.tune.analysis.experiment_analysis", "ray.tune.tune")
"""Warn that results are not in files that nobody asked for, and how to restore a state that is not restored."""
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_sweep(
    config: SweepConfig,
    request: TrainRequest,
    trials: Mapping[str, Trial],
    chooser: Chooser,
    ended: Sequence[TrialRecord],
    *,
    at_once: int,
    on_begin: Begin,
    on_end: End,
) -> None:
    """Runs the chooser's trials, and tells how each began and ended.

    Ctrl-C ends those that run with a checkpoint, and is raised afterwards; once more, and it is raised at once.

    Args:
        config: The sweep.
        request: What all trials share; its `run_dir` is the sweep's folder.
        trials: Every trial of the space, by name.
        chooser: Says which comes next.
        ended: Trials of this space that an earlier job brought to their end; they are not run again.
        at_once: Trials that run at once.
        on_begin: Called as a trial begins.
        on_end: Called with a trial's last report; None when its actor was lost for good.
    """
    from ray import tune

    from layerplan.sweep.searcher import TrialSearcher
    from layerplan.sweep.trainable import Shared, TrialActor

    for record in ended:
        chooser.tell(trials[record.name].point, float("inf") if record.loss is None else record.loss)
    judged = [trials[record.name].point for record in ended] if config.scheduler == "asha" else []
    first = chooser.choose()
    if first is None:
        return
    searcher = TrialSearcher(chooser, judged, first, on_begin, on_end)
    folder = _clear(request.run_dir)
    os.environ.update(_QUIET)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(TrialActor, shared=Shared(request, dict(trials))), {"CPU": DRIVER_CPUS}
        ),
        tune_config=tune.TuneConfig(
            metric=LOSS,
            mode="min",
            search_alg=searcher,
            num_samples=len(judged) + chooser.most,
            max_concurrent_trials=at_once,
            scheduler=_make_scheduler(config),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=request.config.max_failures),
        ),
    )
    with ending_trials_on_ctrl_c():
        tuner.fit()
    _clear(request.run_dir)


@contextmanager
def ending_trials_on_ctrl_c() -> Iterator[None]:
    """Asks Ray Tune to end its trials by SIGUSR1, which it takes for that; its own handler of Ctrl-C calls the sweep done.

    Where Ctrl-C is ignored, as by a shell that starts a job in the background, it stays so.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    was_pressed = False

    def end_trials(signum: int, frame: Any) -> None:
        nonlocal was_pressed
        if was_pressed or signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # Ray Tune does not run yet
            raise KeyboardInterrupt
        was_pressed = True
        logger.info("Ctrl-C (once more ends at once): ending the trials that run, with a checkpoint")
        os.kill(os.getpid(), signal.SIGUSR1)

    previous = signal.signal(signal.SIGINT, end_trials)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if was_pressed:
        raise KeyboardInterrupt


def _clear(sweep: Path) -> Path:
    """Removes what Ray Tune and Ray Train kept of an earlier job; returns a new folder's name."""
    for prefix in (TUNE_PREFIX, WORKERS_PREFIX):
        for left in sweep.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
    return sweep.resolve() / f"{TUNE_PREFIX}{uuid.uuid4().hex[:12]}"


def _make_scheduler(config: SweepConfig) -> Any:
    if config.scheduler == "none":
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr=PERCENT,
        max_t=100,
        grace_period=100 * config.grace_share,
        reduction_factor=config.reduction_factor,
    )
