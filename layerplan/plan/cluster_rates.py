"""What the devices and links of a cluster reach, as values: measured by `layerplan cluster check`, or published and assumed.

Each value carries where it is from, so that a prediction can say what it stands on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from layerplan.errors import ConfigError

GIGABIT = 1e9 / 8
KNOWN_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bfloat16 rates from the makers' data sheets."""
REACHED_FLOPS = 0.40
"""Share of a data sheet's matrix rate that a training's compute reaches: 42 to 46 % were measured on an H100
(benchmarks/results/training_gpu.md), of a compiled model at a good batch."""
REACHED_LINK = 0.8
"""Share of a link's rate that NCCL's collectives reach."""
REACHED_GLOO = 0.85
"""That of gloo's, measured over links of 40 and 100 Mb/s between two hosts: 0.90 of gradients in buckets, 0.77 of shards
(docs/log.md)."""
CORE_TOKENS_PER_S = 3.3e6
"""Tokens one core reads from a store (benchmarks/results/corpus.md)."""
DATA_CORES = 1
"""Cores of a node that read rows."""
COPY_BYTES_PER_S = {True: 20e9, False: 2e9}
"""From a GPU to its host, and within a host: what a save waits for."""
STORAGE_BYTES_PER_S = 2e9
"""What one node writes to shared storage."""
CORE_FLOPS_PER_S = 50e9
HOST_BYTES_PER_S = 5e9
"""What one worker moves to another on its host without NVLink, and what a core's memory gives the optimizer."""


@dataclass(frozen=True)
class DeviceSheet:
    """A device and its node as their maker describes them."""

    flops: float
    """Dense bfloat16 rate, FLOP/s."""
    memory: float
    """Bytes."""
    memory_rate: float
    """Bytes per second."""
    link: float
    """Bytes per second one device sends to others of its node."""


SHEETS = {
    "H200": DeviceSheet(KNOWN_PEAK_TFLOPS["H200"] * 1e12, 141e9, 4.8e12, 450e9),
    "H100": DeviceSheet(KNOWN_PEAK_TFLOPS["H100"] * 1e12, 80e9, 3.35e12, 450e9),
}
"""SXM modules by NVIDIA's data sheets; NVLink's 900 GB/s count both directions."""
CARDS_PER_NODE = 8
CARD_GBITS_PER_S = 400
"""One network card of 400 Gb/s beside each GPU."""


@dataclass(frozen=True)
class ClusterRates:
    """Rates of one cluster of equal nodes."""

    workers_per_node: int
    flops: float
    """Of one worker, as reached, FLOP/s."""
    memory: float
    """Of one worker, bytes."""
    memory_rate: float
    """Of one worker, bytes per second."""
    inside: float
    """Bytes per second one worker sends within its node, as reached."""
    between: float
    """Bytes per second one node sends to others, over all its cards, as reached."""
    copy: float
    """Bytes per second of one worker's save."""
    storage: float
    """Bytes per second one node writes to shared storage."""
    hides: bool
    """Whether communication runs beside compute, as on a GPU; gloo takes the cores that compute."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each is from, by what it is."""


def take_sheet(name: str, *, workers_per_node: int = CARDS_PER_NODE) -> ClusterRates:
    """Rates of nodes with the devices of a data sheet.

    Args:
        name: A key of `SHEETS`.
        workers_per_node: Devices of a node, each with its card.
    """
    sheet, cards = SHEETS[name], workers_per_node
    return ClusterRates(
        workers_per_node=workers_per_node,
        flops=REACHED_FLOPS * sheet.flops,
        memory=sheet.memory,
        memory_rate=sheet.memory_rate,
        inside=REACHED_LINK * sheet.link,
        between=REACHED_LINK * cards * CARD_GBITS_PER_S * GIGABIT,
        copy=COPY_BYTES_PER_S[True],
        storage=STORAGE_BYTES_PER_S,
        hides=True,
        sources={
            "compute": f"{REACHED_FLOPS:.0%} of {sheet.flops / 1e12:g} TFLOP/s ({name} data sheet; share measured on an H100)",
            "memory": f"{sheet.memory / 1e9:g} GB at {sheet.memory_rate / 1e12:g} TB/s ({name} data sheet)",
            "links": f"{REACHED_LINK:.0%} (assumed) of {sheet.link / 1e9:g} GB/s a GPU within a node (data sheet) and of"
            f" {cards} x {CARD_GBITS_PER_S} Gb/s a node",
            "storage": f"{STORAGE_BYTES_PER_S / 1e9:g} GB/s a node (assumed)",
        },
    )


def assume_cpus(*, workers_per_node: int = 1) -> ClusterRates:
    """Rates of nodes without GPUs and with one card, before anything is measured."""
    return ClusterRates(
        workers_per_node=workers_per_node,
        flops=CORE_FLOPS_PER_S,
        memory=8e9,
        memory_rate=HOST_BYTES_PER_S,
        inside=HOST_BYTES_PER_S,
        between=REACHED_GLOO * 10 * GIGABIT,
        copy=COPY_BYTES_PER_S[False],
        storage=STORAGE_BYTES_PER_S,
        hides=False,
        sources={
            "compute": f"{CORE_FLOPS_PER_S / 1e9:g} GFLOP/s a worker (assumed)",
            "memory": "8 GB a worker (assumed)",
            "links": f"{REACHED_GLOO:.0%} (measured over slower links) of 10 Gb/s a node (assumed)",
            "storage": f"{STORAGE_BYTES_PER_S / 1e9:g} GB/s a node (assumed)",
        },
    )


def read_check(values: Mapping[str, Any], file: str, *, workers_per_node: int | None = None) -> ClusterRates:
    """Rates of a checked cluster; what was not measured there is taken from data sheets or assumed, and said so.

    Args:
        values: The content of what `layerplan cluster check --out` wrote.
        file: Its name, for what is said.
        workers_per_node: Workers of a node; left out, its GPUs, or one.

    Raises:
        ConfigError: When it is no such content, or its GPUs are of no known kind.
    """
    try:
        nodes = list(values["nodes"])
        devices = min((node["devices"] for node in nodes), key=len)
        memory = min(node["memory"] for node in nodes)
        core, storage = values.get("core_flops_per_s"), values.get("storage_bytes_per_s")
        between = values["all_reduce_bytes_per_s"]["over_all"]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{file}: is not what `layerplan cluster check --out` writes") from None
    if devices:
        rates = _take_devices(devices, file, workers_per_node)
    else:
        workers = workers_per_node or 1
        rates = replace(assume_cpus(workers_per_node=workers), memory=memory / workers)
        sources = dict(rates.sources) | {"memory": f"{memory / 1e9:.1f} GB a node ({file})"}
        if core is not None:
            rates = replace(rates, flops=core)
            sources["compute"] = f"{core / 1e9:.1f} GFLOP/s of one core ({file})"
        if between is not None:
            rates = replace(rates, between=between)
            sources["links"] = f"{between / 1e9:.3f} GB/s a node, all nodes at once ({file})"
        rates = replace(rates, sources=sources)
    if storage is not None:
        said = f"{storage / 1e9:.3g} GB/s a node ({file})"
        rates = replace(rates, storage=storage, sources={**rates.sources, "storage": said})
    return rates


def _take_devices(devices: Any, file: str, workers_per_node: int | None) -> ClusterRates:
    name = str(devices[0][0])
    known = next((key for key in SHEETS if key in name), None)
    if known is None:
        raise ConfigError(f"{file}: its GPU is {name!r}; known are {', '.join(SHEETS)}")
    rates = take_sheet(known, workers_per_node=workers_per_node or len(devices))
    links = f"{rates.sources['links']}; gloo's rate in {file} is not NCCL's and not used"
    return replace(rates, memory=float(devices[0][1]), sources={**rates.sources, "links": links})
