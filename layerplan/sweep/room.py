"""How many trials fit into a cluster at once: those it could ever hold, and those there is room for now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from layerplan.errors import ClusterError

DRIVER_CPUS = 0.1
"""A trial's driver only waits for its workers."""
READER_CPUS = 0.25
"""A reading task must fit beside the workers, or they would wait for data forever."""
_ROUNDING = 1e-6

Resources = Mapping[str, float]


@dataclass(frozen=True)
class TrialNeeds:
    """What one trial reserves."""

    num_workers: int
    worker: Resources
    """Of each worker; they may be on different nodes."""

    def __str__(self) -> str:
        each = " and ".join(f"{amount:g} {name}" for name, amount in self.worker.items())
        return f"{self.num_workers} workers of {each}, and {DRIVER_CPUS + READER_CPUS:g} CPU beside them"


def count_fitting(nodes: Sequence[Resources], needs: TrialNeeds) -> int:
    """Trials that fit into nodes of these resources: a worker is on one node, CPUs beside workers are counted over all."""
    places = sum(_count_places(node, needs.worker) for node in nodes)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    per_trial = needs.num_workers * needs.worker.get("CPU", 0.0) + DRIVER_CPUS + READER_CPUS
    return min(places // needs.num_workers, math.floor(cpus / per_trial + _ROUNDING))


def choose_concurrency(
    asked: int | Literal["auto"], needs: TrialNeeds, *, whole: Sequence[Resources], free: Sequence[Resources]
) -> tuple[int, str]:
    """How many trials run at once, and a line when it is not what was asked for.

    Args:
        asked: `sweep.max_concurrent_trials`.
        needs: Of one trial.
        whole: Resources of every node.
        free: What of them nobody uses now.

    Raises:
        ClusterError: When the cluster will never hold so many.
    """
    ever, now = count_fitting(whole, needs), count_fitting(free, needs)
    wanted = 1 if asked == "auto" else asked
    if wanted > ever:
        raise ClusterError(
            f"sweep.max_concurrent_trials={asked}: a trial takes {needs}; the cluster holds at most {ever} at once; lower it or"
            " train.num_workers or train.num_cpus_per_worker, or use a larger cluster"
        )
    chosen = max(1, now) if asked == "auto" else min(asked, max(1, now))
    if now == 0:
        return chosen, "no room for a trial at the moment; the first waits for it"
    if asked != "auto" and chosen < asked:
        return chosen, f"{chosen} trials at once in place of {asked}: others use the rest of the cluster"
    return chosen, ""


def read_nodes() -> tuple[list[Resources], list[Resources]]:
    """Resources of every node of the cluster at hand, and what of them is free."""
    import ray
    from ray._private.state import available_resources_per_node

    alive = [node for node in ray.nodes() if node["Alive"]]
    free = available_resources_per_node()
    return [node["Resources"] for node in alive], [free.get(node["NodeID"], {}) for node in alive]


def _count_places(node: Resources, worker: Resources) -> int:
    counts = [math.floor(node.get(name, 0.0) / amount + _ROUNDING) for name, amount in worker.items() if amount > 0]
    return min(counts, default=1_000_000)
