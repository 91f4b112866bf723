"""A run on a cluster that another job fills."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.ray_script import run_script


def test_a_run_on_a_full_cluster_says_within_ten_seconds_what_it_waits_for_and_who_has_it() -> None:
    with tempfile.TemporaryDirectory(prefix="lpw", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ended = run_script(__file__, timeout_s=200, RAY_TMPDIR=folder)
    assert ended.returncode == 0, ended.stdout[-3000:]
    said = ended.stdout.splitlines()
    (line,) = [line for line in said if line.startswith("[wait]") and "free:" in line]
    seconds = int(line.split()[1])
    assert 5 <= seconds < 10, line
    assert "2 x worker of 1 CPU" in line and "free: 1 of 2 CPU" in line, line
    assert "1 CPU by job " in line and f"({Path(__file__).name}, pid " in line and "Hog" in line, line
    assert any("resources are there after" in line for line in said), said


def other_job() -> None:
    """Holds one of two CPUs until it is killed."""
    import ray

    @ray.remote(num_cpus=1)
    class Hog:
        def ready(self) -> None: ...

    ray.init(address=sys.argv[1], log_to_driver=False)
    hog = Hog.remote()
    ray.get(hog.ready.remote())
    print("holding", flush=True)
    time.sleep(300)


def main() -> None:
    import ray
    from ray.util.placement_group import placement_group

    from layerplan.config.cluster import ClusterConfig
    from layerplan.ray_session import connect

    connect(ClusterConfig(num_cpus=2), min_cpus=1)
    command = [sys.executable, __file__, ray.get_runtime_context().gcs_address]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and "holding" in other.stdout.readline()
    group = placement_group([{"CPU": 1}, {"CPU": 1}])
    assert not group.wait(11), "there was room"
    other.kill()
    assert group.wait(60), "the room of a job that is gone is not free"
    time.sleep(4)
    ray.shutdown()


if __name__ == "__main__":
    from layerplan.log import set_up

    set_up()
    other_job() if len(sys.argv) > 1 else main()
