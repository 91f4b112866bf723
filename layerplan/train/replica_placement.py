"""Which nodes the workers of a training may be on, as Ray Train takes it; each replica on one node where that is wanted.

Ray Train has one strategy for all workers, and numbers them node by node, so that the ranks of a replica follow each other
(`layerplan/train/sharding.py`). Which node a replica is on is chosen when Ray Train starts the workers, and again each time
it starts them anew: a node that was lost is not asked for a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray.train

from layerplan.config.train import TrainConfig
from layerplan.sharing.books import read_nodes
from layerplan.sharing.demand import Demand
from layerplan.sharing.rule import choose_group_nodes

NODE_ID = "ray.io/node-id"
NOWHERE = "no-node-holds-a-replica"
"""A node that there is not, so that Ray Train tries again until there is room."""
STRATEGIES = {"auto": "PACK", "pack": "PACK", "strict_pack": "STRICT_PACK", "spread": "SPREAD"}


def make_scaling(config: TrainConfig, workers: dict[str, Any], resources: dict[str, float]) -> ray.train.ScalingConfig:
    """Number and place of the workers.

    Args:
        config: Labels, placement and replicas.
        workers: How many there are, as Ray Train takes it.
        resources: Of one worker.
    """
    shared: dict[str, Any] = {
        **workers,
        "use_gpu": config.use_gpu,
        "resources_per_worker": resources,
        "label_selector": dict(config.labels) or None,
    }
    if config.num_replicas > 1 and config.placement in ("auto", "strict_pack"):
        size = config.fewest_workers // config.num_replicas
        must = config.placement == "strict_pack"
        return ReplicaScaling(**shared, placement_strategy="PACK", replica_size=size, must=must)
    return ray.train.ScalingConfig(**shared, placement_strategy=STRATEGIES[config.placement])


@dataclass
class ReplicaScaling(ray.train.ScalingConfig):
    """Workers in groups that each lie on one node."""

    replica_size: int = 1
    must: bool = False
    """Whether to wait for such nodes; else they are only preferred."""
    nodes: list[str] = field(default_factory=list)
    """Those chosen last, a worker each."""

    def _label_selector_per_worker(self, num_workers: int) -> list[dict[str, str]] | None:
        """What Ray Train's controller asks before it starts workers."""
        demand = Demand(
            what="training worker",
            field="train",
            count=num_workers,
            resources=self._resources_per_worker_not_none,
            labels=self.label_selector or {},
            together=self.replica_size,
        )
        self.nodes = choose_group_nodes(demand, read_nodes(), waits=self.must)
        if not self.nodes and not self.must:
            chosen: list[dict[str, str]] | None = super()._label_selector_per_worker(num_workers)
            return chosen
        return [demand.labels | {NODE_ID: node} for node in self.nodes or [NOWHERE] * num_workers]
