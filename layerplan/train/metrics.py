"""Names of the training metrics, and the sink they go to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"
TOKENS_SEEN = "train/tokens_seen"
SKIPPED_STEPS = "train/skipped_steps"
ROLLBACKS = "train/rollbacks"
VALIDATION_LOSS = "validation/loss"
TOKENS_PER_S = "perf/tokens_per_s"
STEP_S = "perf/step_s"
MFU = "perf/mfu"
DATA_WAIT_SHARE = "perf/data_wait_share"
PHASE_SHARE = "perf/{phase}_share"
CHECKPOINT_STALL_S = "perf/checkpoint_stall_s"
FROZEN_CHECKS = "train/frozen_checks"
FROZEN_CHECK_S = "perf/frozen_check_s"
PEAK_MEMORY_GIB = "perf/peak_memory_gib"
PREDICTED_MEMORY_GIB = "perf/predicted_memory_gib"
SLOWEST_RANK = "perf/slowest_rank"
WORKERS = "train/workers"
BEHIND_S = "perf/slowest_rank_behind_s"
"""Seconds a step by which it is behind the rank that waits longest."""
NODE = "system/node_{node}/{name}"
"""Of a node, as MLflow names its own system metrics."""


class MetricSink(Protocol):
    """Where rank 0 sends its numbers; made by a factory that travels to the worker."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of one step."""

    def log_event(self, name: str, step: int, message: str) -> None:
        """Takes something that happened, such as a skipped step."""

    def drop_after(self, step: int) -> None:
        """Drops the numbers of later steps, which are trained again."""

    def close(self) -> None:
        """Flushes what is buffered."""
