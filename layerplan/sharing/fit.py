"""Whether a cluster could ever hold what a run asks for, before anything is placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from layerplan.errors import ClusterError
from layerplan.sharing.demand import Demand, count_room, suits
from layerplan.sharing.describe import describe_demand, render_labels
from layerplan.sharing.rule import Node

OWN = ("ray.io/node-id",)
"""Labels that only one node has."""


def check_fit(demands: Iterable[Demand], nodes: Collection[Node]) -> None:
    """Checks each demand by itself against the nodes as if nobody else used them.

    Raises:
        ClusterError: When no node has the labels, or those that have them cannot hold it.
    """
    for demand in demands:
        suitable = [node for node in nodes if suits(node.labels, demand.labels)]
        if not suitable:
            raise ClusterError(
                f"{demand.field}.labels: no node satisfies {render_labels(demand.labels)};"
                f" the cluster has {describe_labels(nodes)}"
            )
        rooms = [min(demand.count, count_room(node.total, demand.resources)) for node in suitable]
        rooms = [room // demand.together * demand.together for room in rooms]
        if sum(rooms) < demand.count:
            kind = "that its labels allow " if demand.labels else ""
            where = f"the {len(suitable)} {'node' if len(suitable) == 1 else 'nodes'} {kind}"
            raise ClusterError(
                f"{demand.field}: {describe_demand(demand)}: {where}could hold {sum(rooms):g} of them if nobody else used"
                " them; lower what is asked for, change labels or placement, or use a larger cluster"
            )


def describe_labels(nodes: Collection[Node]) -> str:
    """Which labels there are, and on how many nodes."""
    counts = Counter(f"{key}={value}" for node in nodes for key, value in node.labels.items() if key not in OWN)
    listed = ", ".join(
        f"{label} ({count} {'node' if count == 1 else 'nodes'})" for label, count in sorted(counts.items())
    )
    return f"the labels {listed}" if listed else "no labels but node ids"
