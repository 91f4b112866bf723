"""The profiler switch: a trace of one chosen step, readable by Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from layerplan.run_folder import name_step

logger = logging.getLogger(__name__)


@contextmanager
def profiled(folder: Path | None, step: int) -> Iterator[None]:
    """Writes `step_XXXXXXXX.json` into the folder; does nothing without one."""
    if folder is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name_step(step)}.json"
    profiler.export_chrome_trace(str(path))
    logger.info("profiler trace of step %d: %s", step, path)
