"""What ranks tell each other at a log line: how long each waited for the others, for its rows, its memory, its node's load.

A step begins on all ranks when the last one is ready, so that a rank shows itself as the slowest by waiting least for the
others. Counted is what the host waits between steps, and where a replicated model's gradients meet; time that the
collectives of a sharded model or a GPU's queue hide is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from layerplan.train import metrics


@dataclass(frozen=True)
class PeerFacts:
    """Of one rank since the last log line."""

    node: float
    """Index of its node."""
    waited_s: float
    """For other ranks."""
    data_s: float
    """For rows."""
    peak_memory_gib: float
    """Highest so far."""
    cpu_percent: float
    """Of all cores of its node."""
    memory_mb: float
    """In use on its node."""
    memory_percent: float
    """The same, of what the node has; 0 with the two before where nobody looks."""


def gather_facts(mine: PeerFacts, world_size: int, group: dist.ProcessGroup | None) -> list[PeerFacts]:
    """The facts of all ranks, in order; every rank takes part.

    Args:
        mine: Of this rank.
        world_size: Ranks.
        group: A gloo group of all ranks; the default group, which then has to be one, without it.
    """
    if world_size == 1:
        return [mine]
    values = torch.tensor(astuple(mine), dtype=torch.float64)
    gathered = [torch.empty_like(values) for _ in range(world_size)]
    dist.all_gather(gathered, values, group=group)
    return [PeerFacts(*each.tolist()) for each in gathered]


def summarise_peers(peers: Sequence[PeerFacts], *, steps: int, seconds: float) -> dict[str, float]:
    """Metrics of all ranks together, and of each node.

    Args:
        peers: By rank.
        steps: Steps since the last log line.
        seconds: What they took.
    """
    waits = [peer.waited_s for peer in peers]
    values = {
        metrics.DATA_WAIT_SHARE: max(peer.data_s for peer in peers) / max(seconds, 1e-9),
        metrics.PEAK_MEMORY_GIB: max(peer.peak_memory_gib for peer in peers),
    }
    if len(peers) > 1:
        values[metrics.SLOWEST_RANK] = float(waits.index(min(waits)))
        values[metrics.BEHIND_S] = (max(waits) - min(waits)) / max(steps, 1)
    for peer in {peer.node: peer for peer in reversed(peers) if peer.memory_mb}.values():
        name = metrics.NODE.format(node=int(peer.node), name="{}")
        values[name.format("cpu_utilization_percentage")] = round(peer.cpu_percent, 1)
        values[name.format("system_memory_usage_megabytes")] = round(peer.memory_mb, 1)
        values[name.format("system_memory_usage_percentage")] = round(peer.memory_percent, 1)
    return values
