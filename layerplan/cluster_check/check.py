"""The check itself: a probe on every node, asked one thing after another, each answer within a time limit."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from layerplan.artifacts import write_json
from layerplan.cluster_check.facts import NodeFacts
from layerplan.cluster_check.findings import (
    Finding,
    StorageTrial,
    judge_bandwidth,
    judge_clocks,
    judge_nodes,
    judge_ports,
    judge_space,
    judge_storage,
    judge_versions,
)
from layerplan.cluster_check.probe import TIMEOUT_S, NodeProbe
from layerplan.errors import first_line
from layerplan.ray_access import list_loopback_variables
from layerplan.storage.address import hide_keys

START_S = 120
"""How long a node may take to start a process."""
CLOCK_TRIES = 5
Pair = tuple[str, str]


@dataclass(frozen=True)
class Checked:
    """All that was measured, and what was found of it."""

    facts: tuple[NodeFacts, ...]
    findings: tuple[Finding, ...]
    pairs: dict[Pair, float] = field(default_factory=dict)
    """All-reduce bandwidth of two nodes, bytes per second and node, by their addresses."""
    over_all: float | None = None
    """That of all nodes together; None for one node."""
    core_flops: float | None = None
    """Of the slowest node's core in a float32 matrix product, FLOP/s; None when one did not answer."""
    storage_rate: float | None = None
    """Bytes per second that one node alone writes to the storage; None when none was named or it cannot be written."""

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What did not pass."""
        return tuple(each for each in self.findings if not each.is_ok)

    def save(self, path: Path) -> None:
        """Writes the measurements as JSON, for predictions of runs on this cluster."""
        write_json(
            path,
            {
                "nodes": [
                    {name: value for name, value in asdict(each).items() if name != "hashes"} for each in self.facts
                ],
                "all_reduce_bytes_per_s": {
                    "pairs": [{"nodes": list(pair), "rate": rate} for pair, rate in self.pairs.items()],
                    "over_all": self.over_all,
                },
                "core_flops_per_s": self.core_flops,
                "storage_bytes_per_s": self.storage_rate,
                "findings": [asdict(each) for each in self.findings],
            },
        )


@dataclass(frozen=True)
class Node:
    """A node that is asked."""

    label: str
    """Its address; with the beginning of its id where several nodes share one."""
    address: str
    probe: Any
    """Handle of the actor on it."""


def check_cluster(*, storage: str | None, min_nodes: int) -> Checked:
    """Checks every node of the connected cluster.

    Args:
        storage: Folder or address that runs will be stored at; None leaves that out.
        min_nodes: How many nodes are wanted.
    """
    nodes, silent = start_probes()
    try:
        facts, silent = _ask_facts(nodes, silent)
        there = [node for node in nodes if node.label in {each.label for each in facts}]
        findings = [*judge_nodes(facts, silent, min_nodes), *judge_versions(facts)]
        findings += [_answered("clocks", lambda: judge_clocks(*_compare_clocks(there))), *judge_space(facts)]
        rate = None
        if storage is not None:
            trial = _try_storage(there, storage)
            findings.append(judge_storage(trial, len(there)))
            rate = trial.rate or None
        core = _measure_cores(there)
        if len(there) < 2:
            return Checked(tuple(facts), tuple(findings), core_flops=core, storage_rate=rate)
        findings.append(_answered("ports", lambda: judge_ports(_try_ports(there), len(there) * (len(there) - 1))))
        pairs, faults, over_all = _measure_bandwidth(there)
        findings += judge_bandwidth(pairs, faults, over_all)
        return Checked(tuple(facts), tuple(findings), pairs, over_all, core, rate)
    finally:
        for node in nodes:
            ray.kill(node.probe)


def start_probes() -> tuple[list[Node], dict[str, str]]:
    """A probe on every node that is alive, and why others are silent."""
    listed = ray.nodes()
    variables = list_loopback_variables()
    shared = Counter(node["NodeManagerAddress"] for node in listed if node["Alive"])
    nodes, silent = [], {}
    for node in listed:
        address, node_id = str(node["NodeManagerAddress"]), str(node["NodeID"])
        label = address if shared[address] < 2 else f"{address}#{node_id[:4]}"
        if not node["Alive"]:
            silent[f"{address}#{node_id[:4]}"] = "Ray calls it dead"
            continue
        strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
        probe = ray.remote(num_cpus=0, max_restarts=0)(NodeProbe).options(scheduling_strategy=strategy)
        nodes.append(Node(label, address, probe.remote(label, address, variables)))
    return nodes, silent


def list_rounds(names: Sequence[str]) -> Iterator[list[Pair]]:
    """All pairs in rounds in which nobody is in two of them, as a tournament is drawn up."""
    wheel: list[str | None] = [*names] + [None] * (len(names) % 2)
    for _ in range(len(wheel) - 1):
        half = len(wheel) // 2
        met = zip(wheel[:half], reversed(wheel[half:]), strict=True)
        yield [(left, right) for left, right in met if left is not None and right is not None]
        wheel = [wheel[0], wheel[-1], *wheel[1:-1]]


def _answered(check: str, ask: Callable[[], Finding]) -> Finding:
    """What was found, or that a node did not answer in time."""
    try:
        return ask()
    except ray.exceptions.RayError as error:
        return Finding(
            check, f"no answer ({first_line(error)})", "look at the raylets' logs: a node went away meanwhile"
        )


def _ask_facts(nodes: Sequence[Node], silent: Mapping[str, str]) -> tuple[list[NodeFacts], dict[str, str]]:
    waiting = [(node.label, node.probe.tell.remote()) for node in nodes]
    facts: list[NodeFacts] = []
    found = dict(silent)
    deadline = time.monotonic() + START_S
    for label, reference in waiting:
        try:
            facts.append(ray.get(reference, timeout=max(1.0, deadline - time.monotonic())))
        except ray.exceptions.RayError as error:
            found[label] = first_line(error)
    return facts, found


def _compare_clocks(nodes: Sequence[Node]) -> tuple[dict[str, float], float]:
    """How far each clock is ahead of this process's, by the quickest of a few questions, and how sure that is."""
    skews, unsure = {}, 0.0
    for node in nodes:
        tries = []
        for _ in range(CLOCK_TRIES):
            asked = time.time()
            told = ray.get(node.probe.read_clock.remote(), timeout=TIMEOUT_S)
            took = time.time() - asked
            tries.append((took / 2, told - asked - took / 2))
        half, skews[node.label] = min(tries)
        unsure = max(unsure, half)
    return skews, unsure


def _try_storage(nodes: Sequence[Node], storage: str) -> StorageTrial:
    """Every node writes a file and renames it; then every node looks for all of them."""
    place = f"{storage.rstrip('/')}/layerplan-check-{secrets.token_hex(4)}"
    shown = hide_keys(storage)
    names = {node.label: f"from-{index}" for index, node in enumerate(nodes)}
    first, *others = nodes
    limit = {"timeout": 2 * TIMEOUT_S}
    try:
        if fault := ray.get(first.probe.write.remote(place, names[first.label]), **limit):
            return StorageTrial(shown, fault=fault)
        written = ray.get([node.probe.write.remote(place, names[node.label]) for node in others], **limit)
        unwritable = tuple((node.label, why) for node, why in zip(others, written, strict=True) if why)
        looked_for = [name for label, name in names.items() if label not in dict(unwritable)]
        started = time.monotonic()
        unseen = ray.get([node.probe.read.remote(place, looked_for) for node in nodes], **limit)
        blind = tuple(node.label for node, missing in zip(nodes, unseen, strict=True) if missing)
        seconds = time.monotonic() - started
        rate = 0.0 if unwritable else ray.get(first.probe.time_write.remote(place), **limit)
        free = [ray.get(node.probe.clean.remote(place), **limit) for node in nodes]
    except ray.exceptions.RayError as error:
        return StorageTrial(shown, fault=first_line(error))
    return StorageTrial(shown, "", blind, unwritable, seconds, free[0], rate)


def _measure_cores(nodes: Sequence[Node]) -> float | None:
    """The slowest node's core; nodes of one host one after the other, so that they do not take it from each other."""
    try:
        return min((ray.get(node.probe.compute.remote(), timeout=3 * TIMEOUT_S) for node in nodes), default=None)
    except ray.exceptions.RayError:
        return None


def _try_ports(nodes: Sequence[Node]) -> dict[Pair, str]:
    """Ways from node to node that are closed, and why."""
    ports = ray.get([node.probe.listen.remote() for node in nodes], timeout=TIMEOUT_S)
    ways = {
        (source.label, target.label): source.probe.connect.remote(target.address, port)
        for (source, _), (target, port) in permutations(zip(nodes, ports, strict=True), 2)
    }
    answers = ray.get(list(ways.values()), timeout=TIMEOUT_S + 5 * len(nodes))
    return {way: why for way, why in zip(ways, answers, strict=True) if why}


def _measure_bandwidth(nodes: Sequence[Node]) -> tuple[dict[Pair, float], dict[Pair, str], float | None]:
    """All-reduces of every two nodes, as many at once as have nobody in common, then of all of them."""
    by_label = {node.label: node for node in nodes}
    rates: dict[Pair, float] = {}
    faults: dict[Pair, str] = {}
    for pairs in list_rounds(list(by_label)):
        running = {pair: _start_reduce([by_label[label] for label in pair]) for pair in pairs}
        for pair, members in running.items():
            try:
                rates[pair] = min(ray.get(members, timeout=3 * TIMEOUT_S))
            except ray.exceptions.RayError as error:
                faults[pair] = first_line(error)
    if faults:
        return rates, faults, None
    if len(nodes) == 2:
        return rates, faults, next(iter(rates.values()))
    try:
        return rates, faults, min(ray.get(_start_reduce(nodes), timeout=3 * TIMEOUT_S))
    except ray.exceptions.RayError as error:
        return rates, {("of", "all"): first_line(error)}, None


def _start_reduce(nodes: Sequence[Node]) -> list[Any]:
    """References to what each node will measure."""
    first = nodes[0]
    port = ray.get(first.probe.serve_store.remote(), timeout=2 * TIMEOUT_S)
    return [node.probe.reduce.remote(first.address, port, rank, len(nodes)) for rank, node in enumerate(nodes)]
