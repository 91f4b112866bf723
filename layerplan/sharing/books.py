"""The line of runs of one cluster, kept in its control store, and what the cluster says of its nodes.

An entry is one small value; nothing lives for it, so a killed run leaves only that behind, and whoever reads the line next
removes it, since Ray knows that the job has ended.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from layerplan.sharing.rule import Node, Turn
from layerplan.waiting import Holding, ask_holders

NAMESPACE = b"layerplan"
PREFIX = b"turn/"


def write_turn(turn: Turn) -> None:
    """Writes a run's entry, or writes it anew."""
    _store()._internal_kv_put(_locate(turn), turn.model_dump_json().encode(), overwrite=True, namespace=NAMESPACE)


def remove_turn(turn: Turn) -> None:
    """Takes a run out of the line."""
    _store()._internal_kv_del(_locate(turn), namespace=NAMESPACE)


def read_turns() -> list[Turn]:
    """Everybody in the line, those who started first and then those who wait, in order; what ended jobs left is removed."""
    import ray

    store, turns = _store(), []
    keys = store._internal_kv_list(PREFIX, namespace=NAMESPACE)
    alive = {job["JobID"] for job in ray._private.state.jobs() if not job["IsDead"]} if keys else set()
    for key in keys:
        value = store._internal_kv_get(key, namespace=NAMESPACE)
        with suppress(ValidationError):  # of another version of layerplan
            if value is None:
                continue
            turn = Turn.model_validate_json(value)
            if turn.job in alive:
                turns.append(turn)
            else:
                remove_turn(turn)
    return sorted(turns, key=lambda turn: (turn.started is None, turn.started or 0.0, turn.rank))


def read_nodes() -> list[Node]:
    """Nodes that are alive, with what is free on each."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        Node(node["NodeID"], node["Labels"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def read_holdings() -> tuple[list[Holding], dict[str, str]]:
    """What is placed on the cluster at hand, and the names of its jobs; asks Ray's dashboard."""
    import ray

    return ask_holders(ray.get_runtime_context().gcs_address)


def sum_by_job(holdings: list[Holding]) -> dict[str, Counter[str]]:
    """What each job has of every resource, by its id."""
    held: dict[str, Counter[str]] = {}
    for holding in holdings:
        held.setdefault(holding.job, Counter()).update(dict(holding.resources))
    return held


def _store() -> Any:
    from ray.experimental import internal_kv

    return internal_kv


def _locate(turn: Turn) -> bytes:
    return PREFIX + turn.id.encode()
