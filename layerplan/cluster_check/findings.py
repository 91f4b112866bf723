"""What was found of a cluster, judged: pure functions from facts to lines of a table, each failure with its remedy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerplan.cluster_check.facts import NodeFacts

GIB = 2**30
MAX_SKEW_S = 2.0
"""Leases and logs of several nodes are compared by their clocks; larger skews make them say nothing."""
MIN_FREE_GIB = 10.0
MIN_MEMORY_GIB = 4.0
SLOW_SHARE = 0.5
"""A pair of nodes below this share of the median pair's bandwidth is called slow."""
MIN_BANDWIDTH = 0.1e9
"""Bytes per second below which a pair trains nothing in reasonable time: a link of 1 Gbit/s gives this."""
NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    found: str
    advice: str = ""
    """What to do about it; empty when the check passed."""

    @property
    def is_ok(self) -> bool:
        """Whether it passed."""
        return not self.advice


@dataclass(frozen=True)
class StorageTrial:
    """What the nodes saw of one folder."""

    place: str
    fault: str = ""
    """Why the first node could not write or rename; empty when it could."""
    blind: tuple[str, ...] = ()
    """Nodes that did not see, or not whole, what another wrote."""
    unwritable: tuple[tuple[str, str], ...] = ()
    """Nodes that could not write, and why."""
    seconds: float = 0.0
    """From a file's rename to the last node's having read it."""
    free: int | None = None
    """Bytes, where it is a folder."""
    rate: float = 0.0
    """Bytes per second that one node alone writes; 0 when that was not measured."""


def judge_nodes(facts: Sequence[NodeFacts], silent: Mapping[str, str], min_nodes: int) -> list[Finding]:
    """How many nodes there are, what each has, and which did not answer."""
    found = [Finding("nodes", f"{len(facts)} answered", "" if len(facts) >= min_nodes else _lacking(min_nodes))]
    for where, fault in silent.items():
        found.append(
            Finding(
                f"node {where}",
                f"no answer ({fault})",
                "look at its raylet's log, or take it out with `ray stop` there",
            )
        )
    for each in facts:
        devices = ", ".join(f"{name} {size / GIB:.0f} GiB" for name, size in each.devices) or "no GPU"
        has_room = each.available >= MIN_MEMORY_GIB * GIB
        text = (
            f"{each.host}, {each.cpus} CPUs, {each.available / GIB:.1f} of {each.memory / GIB:.1f} GiB free, {devices}"
        )
        advice = "" if has_room else f"less than {MIN_MEMORY_GIB:g} GiB of memory is free: end what else runs there"
        found.append(Finding(f"node {each.label}", text, advice))
    kinds = {each.devices for each in facts}
    if len(kinds) > 1:
        found.append(
            Finding(
                "devices",
                f"{len(kinds)} kinds of nodes",
                "the slowest sets the pace: use nodes of one kind, or give workers of each kind a run of their own",
            )
        )
    return found


def judge_versions(facts: Sequence[NodeFacts]) -> list[Finding]:
    """Whether all nodes have the same packages, to the byte."""
    by_version = _find_unequal([each.versions for each in facts])
    by_hash = [name for name in _find_unequal([each.hashes for each in facts]) if name not in by_version]
    found = []
    if by_version:
        name = by_version[0]
        values = sorted({each.versions.get(name, "missing") for each in facts})
        found.append(
            Finding(
                "versions",
                f"{_name_some(by_version)} differ ({name}: {', '.join(values)})",
                "install the same lock file on every node: pip install -r requirements/cpu.txt or gpu.txt",
            )
        )
    if by_hash:
        found.append(
            Finding(
                "package hashes",
                f"{_name_some(by_hash)} differ at equal versions",
                "a package was changed in place or is of another build: install it again, or submit with --working-dir",
            )
        )
    return found or [
        Finding(
            "versions", f"{len(facts[0].versions) if facts else 0} packages, equal versions and hashes on all nodes"
        )
    ]


def judge_clocks(skews: Mapping[str, float], uncertainty: float) -> Finding:
    """How far the nodes' clocks are from this process's."""
    worst = max(skews, key=lambda name: abs(skews[name]), default="")
    skew = abs(skews.get(worst, 0.0))
    text = f"at most {skew * 1e3:.1f} ms apart (within {uncertainty * 1e3:.1f})"
    is_off = skew - uncertainty > MAX_SKEW_S
    return Finding(
        "clocks",
        f"{text}, at {worst}" if is_off else text,
        f"let an NTP service set the clock of {worst}" if is_off else "",
    )


def judge_space(facts: Sequence[NodeFacts]) -> list[Finding]:
    """Free space of the nodes' own disks."""
    found = []
    for folder in dict.fromkeys(name for each in facts for name in each.free):
        least = min((each for each in facts if folder in each.free), key=lambda each: each.free[folder])
        free = least.free[folder] / GIB
        limit = 1.0 if folder == "/dev/shm" else MIN_FREE_GIB
        advice = f"make room on {least.label}, or point TMPDIR and RAY_TMPDIR elsewhere" if free < limit else ""
        if advice and folder == "/dev/shm":
            advice = f"give {least.label} more shared memory (docker run --shm-size), which Ray keeps objects in"
        found.append(Finding(f"space {folder}", f"{free:.1f} GiB free, least at {least.label}", advice))
    return found


def judge_storage(trial: StorageTrial, num_nodes: int) -> Finding:
    """Whether all nodes read, write and rename in one place."""
    check = f"storage {trial.place}"
    if trial.fault:
        return Finding(check, trial.fault, "name a folder or bucket that every node may write to, as --storage")
    if trial.unwritable:
        where, why = trial.unwritable[0]
        return Finding(check, f"{where} cannot write ({why})", "give every node's user the right to write there")
    if trial.blind:
        return Finding(
            check,
            f"{_name_some(trial.blind)} of {num_nodes} nodes do not see what another wrote",
            "mount one shared file system there on every node, or use a bucket (s3://, gs://)",
        )
    free = "" if trial.free is None else f", {trial.free / GIB:.0f} GiB free"
    text = f"read, written and renamed by {num_nodes} nodes, seen after {trial.seconds:.2f} s{free}"
    is_full = trial.free is not None and trial.free < MIN_FREE_GIB * GIB
    return Finding(check, text, f"make room: less than {MIN_FREE_GIB:g} GiB is left for checkpoints" if is_full else "")


def judge_ports(refused: Mapping[tuple[str, str], str], num_pairs: int) -> Finding:
    """Whether nodes reach each other on ports they choose themselves, as training workers do."""
    if not refused:
        return Finding("ports", f"{num_pairs} ways from node to node are open")
    (source, target), why = next(iter(refused.items()))
    return Finding(
        "ports",
        f"{len(refused)} of {num_pairs} ways are closed: {source} to {target} ({why})",
        f"let the firewall of {target} accept TCP from the other nodes on all ports above 1023",
    )


def judge_bandwidth(
    pairs: Mapping[tuple[str, str], float], faults: Mapping[tuple[str, str], str], over_all: float | None
) -> list[Finding]:
    """All-reduce over gloo, bytes per second and node."""
    found = [
        Finding(
            f"all-reduce {' '.join(pair)}",
            f"failed ({why})",
            "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface that nodes reach each other by",
        )
        for pair, why in faults.items()
    ]
    median = sorted(pairs.values())[len(pairs) // 2] if pairs else 0.0
    for pair, rate in pairs.items():
        is_slow = rate < MIN_BANDWIDTH or rate < SLOW_SHARE * median
        advice = (
            "look at the link of these two (speed, errors, cable), and that both use the same interface"
            if is_slow
            else ""
        )
        found.append(Finding(f"all-reduce {' '.join(pair)}", f"{rate / 1e9:.2f} GB/s", advice))
    if over_all is not None:
        found.append(Finding("all-reduce over all", f"{over_all / 1e9:.2f} GB/s"))
    return found


def render_table(findings: Sequence[Finding]) -> str:
    """The table, and below it what to do."""
    width = max(len(each.check) for each in findings)
    lines = [f"{'ok  ' if each.is_ok else 'FAIL'}  {each.check:<{width}}  {each.found}" for each in findings]
    remedies = [f"{each.check}: {each.advice}" for each in findings if not each.is_ok]
    return "\n".join([*lines, *(["", "What to do", *remedies] if remedies else [])])


def _lacking(min_nodes: int) -> str:
    return f"{min_nodes} are wanted: start `ray start --address` on the others, with the head's token and the same RAY_AUTH_MODE"


def _find_unequal(values: Sequence[Mapping[str, str]]) -> list[str]:
    seen: dict[str, set[str]] = defaultdict(set)
    for name in {name for each in values for name in each}:
        seen[name] |= {each.get(name, "missing") for each in values}
    return sorted(name for name, found in seen.items() if len(found) > 1)


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
