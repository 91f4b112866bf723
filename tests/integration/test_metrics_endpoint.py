"""What rank 0 logs is at the metrics endpoint of its Ray node, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from layerplan.artifacts import read_lines
from layerplan.tracking.tracker import NoopTracker, RunSinkFactory

DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana" / "layerplan.json"
PATIENCE_S = 60
LOGGED = {
    "train/loss": 2.5,
    "perf/mfu": 0.25,
    "perf/slowest_rank": 1.0,
    "system/node_0/cpu_utilization_percentage": 3.0,
}
GAUGE = re.compile(r'^(ray_layerplan_\w+)\{.*\brun="mine".*\} (\S+)$', re.MULTILINE)


class Worker:
    """Rank 0 of a run as it opens what it logs to."""

    def __init__(self, run_dir: Path) -> None:
        from layerplan.config.train import TrainConfig
        from layerplan.models.ref import ModelRef
        from layerplan.train.request import TrainRequest
        from layerplan.train.state import TrainState
        from layerplan.train.worker import open_recorders

        run_dir.mkdir()
        sinks = RunSinkFactory(run_dir / "metrics.jsonl", "train", NoopTracker())
        plan: Any = None
        request = TrainRequest(run_dir, ModelRef("m"), plan, "store", TrainConfig(), seed=0, sink_factory=sinks)
        group: Any = None
        self._recorders = open_recorders(request, TrainState(), 0, 1, group)
        self._sink = self._recorders.__enter__().sink

    def log(self, values: dict[str, float], step: int) -> None:
        assert self._sink is not None
        self._sink.log_metrics(values, step)

    def end(self) -> None:
        self._recorders.__exit__(None, None, None)


def scrape(until: dict[str, float]) -> dict[str, float]:
    """The gauges of the run once they have these values."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + PATIENCE_S
    found: dict[str, float] = {}
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        found = {name: float(value) for name, value in GAUGE.findall(text)}
        if until.items() <= found.items():
            return found
        time.sleep(0.3)
    pytest.fail(f"{address}: {until} expected, {found} found")


def test_what_is_logged_is_at_the_endpoint_and_stays_there_until_the_next_line(ray_local: None, tmp_path: Path) -> None:
    import ray

    worker = ray.remote(num_cpus=0)(Worker).remote(tmp_path / "mine")
    ray.get(worker.log.remote(LOGGED, 5))
    first = scrape({"ray_layerplan_train_step": 5.0})
    assert first == {
        "ray_layerplan_train_loss": 2.5,
        "ray_layerplan_perf_mfu": 0.25,
        "ray_layerplan_perf_slowest_rank": 1.0,
        "ray_layerplan_train_step": 5.0,
    }
    assert first == scrape(first), "a second look, an interval later"
    from layerplan.train.prometheus import DESCRIPTIONS

    everything = {name: float(index) for index, name in enumerate(DESCRIPTIONS)}
    ray.get(worker.log.remote(everything, 10))
    exported = scrape({"ray_layerplan_train_step": 10.0, "ray_layerplan_train_loss": 0.0})
    assert find_names(json.loads(DASHBOARD.read_text(encoding="utf-8"))) <= set(exported)
    ray.get(worker.end.remote())
    lines = read_lines(tmp_path / "mine" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 10] and lines[0].items() >= LOGGED.items()


def find_names(dashboard: Any) -> set[str]:
    """Series that a dashboard's panels and variables ask for."""
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    assert all("ray_layerplan_" in each for each in asked)
    return {name for each in asked for name in re.findall(r"ray_\w+", each)}
