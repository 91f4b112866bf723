"""A job that was submitted with variables of its own, by `ray job submit --runtime-env-json`."""

from __future__ import annotations

import json
import os

from layerplan.ray_session import JOB_CONFIG
from tests.ray_script import run_script


def test_variables_that_a_job_was_submitted_with_reach_its_workers(shared_cluster: dict[str, str]) -> None:
    """Ray refuses to be told one again, with the same value too."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
    told = {JOB_CONFIG: json.dumps({"runtime_env": {"env_vars": own}})}
    done = run_script(__file__, timeout_s=120, **shared_cluster, **own, **told)
    assert done.returncode == 0 and "worker: 1 DEBUG ignore::FutureWarning" in done.stdout, done.stdout[-3000:]


if __name__ == "__main__":
    import ray

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect

    connect(ClusterConfig(), min_cpus=0)
    names = ("HF_HUB_OFFLINE", "VLLM_LOGGING_LEVEL", "PYTHONWARNINGS")
    print(
        "worker:", *ray.get(ray.remote(lambda: [os.environ.get(name) for name in names]).options(num_cpus=0).remote())
    )
