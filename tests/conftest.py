"""Fixtures shared by every test: where the real data is, a local Ray, and an environment with no telemetry."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes beside each other, not threads against each other


MAKES_THE_FINISHED_RUN = "test_chain"
LONG_FILES = ("test_train_exactness", "test_jobs_on_clusters")
"""Each as long as several others together."""
SHARED_CPUS = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long files first, since files are given out in order: one that started last would leave a core idle.

    The file that makes the finished run begins; the longest follow, then other files of clusters, those that wait for that run,
    and quick tests.
    """
    waiting = {item.path for item in items if "finished_run" in getattr(item, "fixturenames", ())}

    def rank(item: pytest.Item) -> int:
        if item.path.stem == MAKES_THE_FINISHED_RUN:
            return 0
        if "integration" not in item.path.parts:
            return 4
        if item.path.stem in LONG_FILES:
            return 1
        return 3 if item.path in waiting else 2

    items.sort(key=rank)  # stable: the order within a file stays


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real corpora and benchmark questions, named by LAYERPLAN_DATA."""
    value = os.environ.get("LAYERPLAN_DATA")
    if not value:
        pytest.skip("LAYERPLAN_DATA is not set: no real corpora at hand")
    return Path(value).resolve()


@pytest.fixture
def ray_local() -> None:
    """The cluster that the tests of this process share, made as a job makes its own; a test may shut it down."""
    import ray
    from ray._private import ray_constants

    if ray.is_initialized():
        return
    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect
    from tests.worker_zygote import forked_workers

    # what keeps this cluster on loopback must not keep there those that tests make of several nodes
    with pytest.MonkeyPatch.context() as patch, forked_workers():
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        connect(ClusterConfig(num_cpus=SHARED_CPUS), min_cpus=1)


@pytest.fixture(scope="session", autouse=True)
def _shut_ray_down() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="lp", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("RAY_TMPDIR", folder)
        yield
        import sys

        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
