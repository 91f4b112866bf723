"""What a run asks of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from pydantic import Field

from layerplan.config.base import StrictModel

_EPS = 1e-6
"""Ray counts in steps of 1/10,000."""


class Demand(StrictModel):
    """So many of one thing, each of which needs its resources on one node."""

    what: str
    """`training worker`, for messages."""
    field: str
    """Field of the config that says which nodes suit, for messages."""
    count: int = Field(ge=0)
    resources: dict[str, float]
    labels: dict[str, str] = {}
    """What a node must satisfy, in Ray's syntax."""
    together: int = Field(default=1, ge=1)
    """How many of them have to lie on one node; divides `count`."""


def count_room(room: Mapping[str, float], resources: Mapping[str, float]) -> float:
    """How many of one thing fit into what a node has; infinitely many when it needs nothing."""
    wanted = {name: amount for name, amount in resources.items() if amount > 0}
    return min((int((room.get(name, 0.0) + _EPS) // amount) for name, amount in wanted.items()), default=inf)


def suits(node_labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy what is wanted; a label that is not there satisfies only what is negated."""
    return all(_satisfies(node_labels.get(key), value) for key, value in wanted.items())


def _satisfies(there: str | None, wanted: str) -> bool:
    is_negated, text = wanted.startswith("!"), wanted.removeprefix("!")
    values = text[3:-1].replace(" ", "").split(",") if text.startswith("in(") else [text]
    return (there in values) != is_negated


def sum_up(demands: list[Demand]) -> dict[str, float]:
    """All that is asked for, by resource."""
    total: dict[str, float] = {}
    for demand in demands:
        for name, amount in demand.resources.items():
            total[name] = total.get(name, 0.0) + demand.count * amount
    return {name: amount for name, amount in total.items() if amount}
