"""Whose turn it is: a pure function of what the nodes have free, what every run asked for, and what it has of that.

Higher priority goes first, then who came first. A run starts when all it asks for can be placed beside what runs that have
started still lack, and beside what those ahead of it in the line could already use. So it passes another only where it takes
nothing that one waits for, and nobody is stopped for anybody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from layerplan.config.base import StrictModel
from layerplan.sharing.demand import Demand, count_room, suits

Room = dict[str, dict[str, float]]
"""Node id to what it has left of each resource."""


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]


class Turn(StrictModel):
    """A run's entry in the line; it stays there until the run ends."""

    id: str
    job: str
    """Ray's id of its job, with which it ends."""
    name: str
    priority: int
    demands: list[Demand]
    since: float
    """Seconds since the epoch."""
    started: float | None = None
    """When its turn came; None while it waits."""
    host: str = ""
    pid: int = 0

    @property
    def rank(self) -> tuple[int, float, str]:
        """By which the line is ordered, the first one the least."""
        return -self.priority, self.since, self.id


def find_ahead(me: Turn, turns: Iterable[Turn]) -> list[Turn]:
    """Those that wait ahead, the next one first."""
    return sorted((turn for turn in turns if turn.started is None and turn.rank < me.rank), key=lambda turn: turn.rank)


def may_start(
    me: Turn, turns: Collection[Turn], nodes: Collection[Node], held: Mapping[str, Mapping[str, float]]
) -> bool:
    """Whether a run's turn has come.

    Args:
        me: The run.
        turns: The whole line; entries of the same job are of runs it has had before.
        nodes: The cluster.
        held: What each job has of every resource now, by its id.
    """
    room = {node.id: dict(node.free) for node in nodes}
    others = [turn for turn in turns if turn.job != me.job]
    for turn in others:
        if turn.started is not None:
            reserve(find_missing(turn.demands, held.get(turn.job, {})), nodes, room)
    for turn in find_ahead(me, others):
        reserve(turn.demands, nodes, room)
    wanted = _order(find_missing(me.demands, held.get(me.job, {})))
    return all(place(demand, nodes, room) is not None for demand in wanted)


def find_missing(demands: Iterable[Demand], held: Mapping[str, float]) -> list[Demand]:
    """What of the demands a run does not hold yet."""
    left, missing = dict(held), []
    for demand in demands:
        there = int(min(demand.count, count_room(left, demand.resources)))
        for name, amount in demand.resources.items():
            left[name] = left.get(name, 0.0) - there * amount
        if there < demand.count:
            missing.append(demand.model_copy(update={"count": demand.count - there}))
    return missing


def place(demand: Demand, nodes: Collection[Node], room: Room) -> list[str] | None:
    """Takes the room for all of a demand, groups whole, on the fullest node that has it.

    Returns:
        The node of each thing, group after group; None when there is no room, and some may have been taken then.
    """
    placed: list[str] = []
    while len(placed) < demand.count:
        size = min(demand.together, demand.count - len(placed))
        places = {node.id: count_room(room[node.id], demand.resources) for node in _find_suitable(demand, nodes)}
        fitting = {name: count for name, count in places.items() if count >= size}
        if not fitting:
            return None
        chosen = min(fitting, key=lambda name: fitting[name])
        _take(room[chosen], demand, size)
        placed += [chosen] * size
    return placed


def reserve(demands: Iterable[Demand], nodes: Collection[Node], room: Room) -> None:
    """Takes what there is for the demands of others; a group that fits nowhere yet waits for any of the nodes."""
    for demand in _order(demands):
        tried = {name: dict(free) for name, free in room.items()}
        if place(demand, nodes, tried) is not None:
            room.update(tried)
            continue
        left = demand.count
        for node in _find_suitable(demand, nodes):
            most = demand.count if demand.together > 1 else left
            taken = int(min(most, count_room(room[node.id], demand.resources)))
            _take(room[node.id], demand, taken)
            left -= taken


def choose_group_nodes(demand: Demand, nodes: Collection[Node], *, waits: bool) -> list[str]:
    """The node of each group of a demand: where there is room now, else, for one that waits, where others may make room.

    Returns:
        The node of each thing of the demand, those of a node beside each other; empty when the nodes cannot hold it.
    """
    for amounts in ("free", "total") if waits else ("free",):
        placed = place(demand, nodes, {node.id: dict(getattr(node, amounts)) for node in nodes})
        if placed is not None:
            return sorted(placed)
    return []


def _find_suitable(demand: Demand, nodes: Collection[Node]) -> list[Node]:
    return [node for node in nodes if suits(node.labels, demand.labels)]


def _take(room: dict[str, float], demand: Demand, count: int) -> None:
    for name, amount in demand.resources.items():
        room[name] = room.get(name, 0.0) - count * amount


def _order(demands: Iterable[Demand]) -> list[Demand]:
    """What is hardest to place first."""
    return sorted(demands, key=lambda each: (-each.together, -sum(each.resources.values())))
