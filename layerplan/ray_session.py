"""One way to reach Ray: the cluster that is there, or a small local one, checked before anything waits on it."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from layerplan.config.cluster import ClusterConfig
from layerplan.errors import ClusterError, first_line
from layerplan.log import get_settings
from layerplan.ray_access import LOOPBACK, ask_for_token, is_loopback, stay_on_loopback
from layerplan.telemetry import QUIET_VARIABLES
from layerplan.waiting import start_watching, telling_slow_start
from layerplan.worker_setup import collect_setup

STAYS_IN_PLACE = {"RAY_CHDIR_TO_TRIAL_DIR": "0"}
"""Ray Train and Ray Tune would have each worker go to a folder of theirs, where no relative path of a config is right."""
WORKER_VARIABLES = {
    **STAYS_IN_PLACE,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
"""Defaults of the workers; what the user's environment sets wins."""

OWN_CLUSTER = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
"""Of a cluster that a job starts on its machine: the machine is not taken away from under it, and a head that is gone does not
come back, so nobody waits a minute for it; 20 s are twice what it takes to say so."""

DASHBOARD_TIMEOUT_S = 180
"""How long the dashboard may take to start on a machine that has other work; Ray gives up after 60 s."""

PORTS = range(20_000, 32_768)
"""Above those of Ray's workers, below those that Linux gives to whoever asks for any."""

PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "PYTHONPATH")
"""Variables of the submitting process that its workers need too, and that everybody may see."""

STORAGE = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
"""Those that say where buckets are; the keys to them are each node's own."""

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In which Ray tells a job's process what the job was submitted with."""

SETUP_HOOK = "worker_process_setup_hook"
"""What Ray calls a function that each new worker calls first."""


def connect(config: ClusterConfig, *, min_cpus: float, min_gpus: float = 0) -> None:
    """Connects to Ray and checks that the cluster can hold the run.

    A cluster named by the config or by RAY_ADDRESS (as under `ray job submit`) is used; otherwise a local one starts that
    listens on loopback only and wants a token. Without its dashboard Ray Train would leak the resources of stopped runs.

    Raises:
        ClusterError: When no cluster can be reached or started, or it is too small.
    """
    import ray

    for name, value in STAYS_IN_PLACE.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        address = config.address or os.environ.get("RAY_ADDRESS")
        for name, value in OWN_CLUSTER.items() if address is None else ():
            os.environ.setdefault(name, value)
        ask_for_token(os.environ, config.auth_mode, make=address is None)
        if address is None or is_loopback(address):
            stay_on_loopback(os.environ)
        where = f"cluster.address={address}" if address else "a local Ray cluster"
        try:
            with _own_sigterm(), telling_slow_start(where):
                _init(address, config)
        except Exception as error:
            raise ClusterError(f"{where}: cannot be reached or started ({find_reason(error)})") from error
        start_watching()
    quiet_engines()
    _check_size(ray.cluster_resources(), min_cpus, min_gpus)


def quiet_engines() -> None:
    """Keeps Ray's own progress to terminals that can redraw it; in a log file it would bury the run's lines.

    Who asks for all there is hears Ray too.
    """
    if logging.getLogger("layerplan").isEnabledFor(logging.DEBUG):
        return
    import ray.data

    names = ["ray.data", "ray.train"]
    reporting = sys.modules.get("ray.train.v2._internal.execution.context")
    if reporting is not None:
        names.append(
            str(reporting.__file__)
        )  # its logger, one line a report and rank, is named by file and not by module
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that the bars are off
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.issue_detectors_config.detectors = []  # six lines every 30 s on how to tune Ray, to who runs a model of any size


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """`ray.init` installs a handler that exits with status 15; a job that has its own keeps it, and its 143."""
    previous = signal.getsignal(signal.SIGTERM)
    yield
    if callable(previous) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, previous)


def _init(address: str | None, config: ClusterConfig) -> None:
    import ray

    variables = {**WORKER_VARIABLES, **QUIET_VARIABLES}
    if logging.getLogger("layerplan").isEnabledFor(logging.DEBUG):
        variables["VLLM_LOGGING_LEVEL"] = "INFO"
    variables |= {name: os.environ[name] for name in (*WORKER_VARIABLES, *PASSED_ON, *STORAGE) if name in os.environ}
    variables |= get_settings()
    # Ray Train's watcher asks the State API whether a run is alive. Where a host has several clusters and the watcher is not
    # told which is its own, it may ask another, hear that the run is unknown there, and free its resources.
    if address is not None:
        if "://" not in address and address != "auto":
            variables["RAY_ADDRESS"] = address
        own = _read_job_environment(os.environ)
        variables = {name: value for name, value in variables.items() if name not in (own.get("env_vars") or {})}
        hook = {} if SETUP_HOOK in own else {SETUP_HOOK: collect_setup(os.environ)}
        ray.init(address=address, runtime_env={"env_vars": variables, **hook}, logging_level=logging.WARNING)
        return
    port = find_free_port()
    constants = ray._private.ray_constants
    constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S = max(constants.RAY_DASHBOARD_STARTUP_TIMEOUT_S, DASHBOARD_TIMEOUT_S)
    variables["RAY_API_SERVER_ADDRESS"] = f"http://{LOOPBACK}:{port}"
    ray.init(
        address="local",
        num_cpus=config.num_cpus,
        include_dashboard=True,
        _node_ip_address=LOOPBACK,
        dashboard_host=LOOPBACK,
        dashboard_port=port,
        runtime_env={"env_vars": variables},
        logging_level=logging.WARNING,
    )


def _read_job_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the job was submitted with: its workers get it anyway, and Ray refuses to be told a part twice."""
    told = json.loads(environment.get(JOB_CONFIG) or "{}")
    return dict(told.get("runtime_env") or {})


def find_reason(error: Exception) -> str:
    """What Ray says first; where that announces lines of a log, the last of them too."""
    first, last = first_line(error), str(error).strip().rpartition("\n")[-1].strip()
    return f"{first} {last}" if first.endswith(":") and last != first else first


def find_free_port() -> int:
    """A drawn port of `PORTS` that nobody listens on.

    Not Ray's usual 8265: two runs started at once would both find it free, and Ray does not look for another then. Nor one
    that the system gives out: the seconds until the dashboard takes it are enough for any connection to be given the same.

    Raises:
        ClusterError: When a hundred of them are taken.
    """
    draw = random.SystemRandom()  # whatever seed the process has set
    for _ in range(100):
        port = draw.choice(PORTS)
        with socket.socket() as listener, suppress(OSError):
            listener.bind((LOOPBACK, port))
            return port
    raise ClusterError(f"a local Ray cluster: no free port among {PORTS.start} to {PORTS.stop - 1} of {LOOPBACK}")


def _check_size(resources: dict[str, float], min_cpus: float, min_gpus: float) -> None:
    for name, needed in (("CPU", min_cpus), ("GPU", min_gpus)):
        there = resources.get(name, 0.0)
        if there < needed:
            raise ClusterError(
                f"cluster: has {there:g} {name}, the run needs at least {needed:g};"
                " lower num_workers or num_*_per_* in the config, or use a larger cluster"
            )
