"""What rank 0 logs, as gauges at the metrics endpoint of its Ray node, from where Prometheus and Ray's dashboard take it.

A metric `train/loss` is the gauge `layerplan_train_loss` here and `ray_layerplan_train_loss` there, with the run's name as its
label `run`. Ray shows nodes itself, so what is logged of them stays out. Ray shows a value for one interval and then forgets
it, so each is said again until the next one comes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ray.util.metrics import Gauge

from layerplan.train import metrics
from layerplan.train.metrics import MetricSink

DESCRIPTIONS = {
    metrics.LOSS: "Mean training loss since the last log line, nats per token",
    metrics.VALIDATION_LOSS: "Loss on held-out rows, nats per token",
    metrics.LEARNING_RATE: "Learning rate",
    metrics.GRAD_NORM: "Gradient norm before clipping",
    metrics.TOKENS_SEEN: "Tokens trained on",
    metrics.SKIPPED_STEPS: "Steps left out as not finite",
    metrics.ROLLBACKS: "Returns to a checkpoint because of a bad step",
    metrics.TOKENS_PER_S: "Tokens per second of all workers",
    metrics.STEP_S: "Seconds per step",
    metrics.MFU: "Share of the workers' peak rate spent on the plan's own FLOPs",
    metrics.DATA_WAIT_SHARE: "Share of a step spent waiting for rows, of the rank that waits longest",
    metrics.CHECKPOINT_STALL_S: "Seconds training stood still for the last checkpoint",
    metrics.PEAK_MEMORY_GIB: "Highest memory of a worker so far, GiB",
    metrics.PREDICTED_MEMORY_GIB: "Memory of a worker as predicted, GiB",
    metrics.WORKERS: "Workers that train",
    metrics.SLOWEST_RANK: "Rank that waits least for the others",
    metrics.BEHIND_S: "Seconds a step by which it is behind the rank that waits longest",
}
STEP = "train/step"
"""Newest step that was logged."""

REPEAT_S = 4.0
"""Below the least interval that Ray is usually given, 5 to 10 s."""


def name_gauge(metric: str) -> str:
    """Name of a metric's gauge; Ray puts `ray_` before it."""
    return "layerplan_" + metric.replace("/", "_")


class RayGauges:
    """A sink that sends everything on to another one, and shows the newest of it as gauges until it is closed."""

    def __init__(self, sink: MetricSink, run: str) -> None:
        """Wraps a sink; `run` is the label of every gauge."""
        self._sink = sink
        described = DESCRIPTIONS | {STEP: "Newest logged step"}
        self._gauges = {name: Gauge(name_gauge(name), text, ("run",)) for name, text in described.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})
        self._newest: dict[str, float] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._repeat, name="layerplan-gauges", daemon=True).start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of one step."""
        self._sink.log_metrics(metrics, step)
        shown = {name: float(value) for name, value in metrics.items() if name in self._gauges}
        self._newest = {**self._newest, **shown, STEP: float(step)}
        self._show()

    def log_event(self, name: str, step: int, message: str) -> None:
        """Sends it on."""
        self._sink.log_event(name, step, message)

    def drop_after(self, step: int) -> None:
        """Sends it on; a gauge has no past to be dropped."""
        self._sink.drop_after(step)

    def close(self) -> None:
        """Sends it on, and says nothing again."""
        self._closed.set()
        self._sink.close()

    def _show(self) -> None:
        for name, value in self._newest.items():
            self._gauges[name].set(value)

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_S):
            self._show()
