"""What Ray keeps of a job that was killed while it asked for placement groups."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

import pytest

from tests.ray_script import run_script

KILLS = 12
NEVER = "nothing was left behind"


def test_what_a_killed_job_left_is_given_back_and_what_lives_on_keeps_its_own() -> None:
    with tempfile.TemporaryDirectory(prefix="lpl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ended = run_script(__file__, timeout_s=200, RAY_TMPDIR=folder)
    assert ended.returncode == 0, ended.stdout[-3000:]
    if NEVER in ended.stdout:
        pytest.skip(f"Ray removed every placement group of {KILLS} killed jobs by itself")


def ask_until_killed() -> None:
    """A detached actor with a group of its own, and actors that ask for one group after the other."""
    import ray
    from ray.util.placement_group import placement_group

    @ray.remote(num_cpus=0)
    class Asking:
        def ask(self, times: int) -> None:
            for _ in range(times):
                placement_group([{"memory": 1}])

    ray.init(address=sys.argv[1], namespace="leftovers", log_to_driver=False)
    keeper = Asking.options(name=sys.argv[2], lifetime="detached").remote()
    ray.get(keeper.ask.remote(1))
    actors = [Asking.remote() for _ in range(3)]
    ray.get([actor.ask.remote(1) for actor in actors])
    for actor in actors:
        actor.ask.remote(1_000_000)
    print("asking", flush=True)
    time.sleep(300)


def main() -> None:
    import ray

    from layerplan import waiting
    from layerplan.config.cluster import ClusterConfig
    from layerplan.leftovers import Leftovers, list_groups
    from layerplan.ray_session import connect

    waiting.GIVE_BACK_EVERY_S = 1e9  # only this process's own calls
    connect(ClusterConfig(num_cpus=2), min_cpus=1)
    for number in range(KILLS):
        command = [sys.executable, __file__, ray.get_runtime_context().gcs_address, f"keeper{number}"]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None and "asking" in other.stdout.readline()
        time.sleep(0.5)
        other.kill()
        time.sleep(3)
        keeper = ray.get_actor(f"keeper{number}", namespace="leftovers")
        own = keeper._actor_id.hex()
        groups = list_groups()
        (kept,) = [group for group in groups if group.actor == own]
        left = [group for group in groups if group != kept]
        leftovers = Leftovers()
        assert leftovers.give_back() == "" and len(list_groups()) == len(groups), "only what was there twice is removed"
        said = leftovers.give_back()
        assert list_groups() == [kept]
        ray.kill(keeper)
        if left:
            job = left[0].job
            assert said == f"gave back a placement group that Ray still reserved for job {job}, which has ended", said
            return
        assert said == ""
    print(NEVER)


if __name__ == "__main__":
    ask_until_killed() if len(sys.argv) > 1 else main()
