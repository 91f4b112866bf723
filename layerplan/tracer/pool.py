"""Probes through a Ray Data actor pool of tracer replicas, to a profile on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from layerplan.actor_pool import ActorPool, map_over_actors
from layerplan.aside import writing_aside
from layerplan.config.trace import TraceConfig
from layerplan.errors import ModelError, ProbeError
from layerplan.models.footprint import estimate_actor_memory
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_profile import LayerProfile
from layerplan.progress import ProgressLines
from layerplan.run_folder import PROBES_NAME, PROFILE_NAME
from layerplan.tracer.actor import SECONDS, TracerActor, encode_batch
from layerplan.tracer.aggregate import build_profile
from layerplan.tracer.encode import EncodedProbe, encode_probes, make_batches
from layerplan.tracer.probes import BUILTIN, collect_probes, hash_probes


def trace_model(
    model: ModelRef, config: TraceConfig, *, out_dir: Path, report: Callable[[str], None] = lambda line: None
) -> LayerProfile:
    """Measures the layers of a model; writes `layer_profile.json` and the per-probe values beside it.

    Ray must be initialised. Per-probe values are kept, so any aggregate can be recomputed without the model. The result
    is a function of the model and the config: an actor that dies has its batch measured again by another, and which
    actor measured what, and in which order, leaves no trace.

    Raises:
        ProbeError: When a probe is malformed or does not fit the model.
        ModelError: When the model cannot be traced.
    """
    probes = collect_probes(config)
    identity = model.identity()
    if identity.num_layers < 2:
        raise ModelError(f"model.name={model}: has {identity.num_layers} layer; tracing needs at least 2")
    tokenizer = model.tokenizer()
    encoded = encode_probes(probes, tokenizer, model.max_positions(), mask_check_every=config.mask_check_every)
    memory = estimate_actor_memory(
        model,
        "float32",
        num_gpus=config.num_gpus_per_actor,
        num_logits=config.batch_size * identity.num_layers * len(tokenizer),
    )
    records = _measure(encoded, model, config, memory, report)
    check_complete([probe.id for probe in probes], [record["id"] for record in records])
    report(describe_time([record.pop(SECONDS) for record in records]))
    profile = build_profile(records, model=identity, config=config, probe_set_sha256=hash_probes(probes))
    _write_records(out_dir / PROBES_NAME, records)
    profile.save(out_dir / PROFILE_NAME)
    return profile


def load_profile(path: Path, config: TraceConfig) -> LayerProfile:
    """The profile that a run has, which is one of the probes that its config names.

    Raises:
        PlanError: When it is malformed or was changed.
        ProbeError: When the file or folder of the probes was changed after it was made.
    """
    profile = LayerProfile.load(path)
    is_own = config.probes == BUILTIN  # those change with a version of layerplan, and its profiles stay
    if not is_own and hash_probes(collect_probes(config)) != profile.probe_set_sha256:
        raise ProbeError(
            f"trace.probes={config.probes}: other probes than {path} was measured with; restore what was there, or choose"
            " another name (--set name=...)"
        )
    return profile


def check_complete(expected: list[str], measured: list[str]) -> None:
    """Raises `ProbeError` unless every probe was measured exactly once."""
    missing = sorted(set(expected) - set(measured))
    surplus = sorted(name for name, count in Counter(measured).items() if count > 1 or name not in set(expected))
    if missing or surplus:
        raise ProbeError(
            f"tracing: {len(measured)} results for {len(expected)} probes;"
            f" missing {missing[:3] or 'none'}, measured twice or unknown {surplus[:3] or 'none'}"
        )


def describe_time(seconds: Sequence[Mapping[str, float | None]]) -> str:
    """Where the time went, the largest part first.

    Args:
        seconds: Of each probe, by what was computed.
    """
    names = dict.fromkeys(part for each in seconds for part in each)
    parts = {part: sum(each.get(part) or 0.0 for each in seconds) for part in names}
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{part} {value / max(total, 1e-9):.0%}" for part, value in largest)
    return f"{len(seconds):,} probes took {total:,.1f} s of the tracing processes: {shares}"


def _measure(
    encoded: list[EncodedProbe],
    model: ModelRef,
    config: TraceConfig,
    memory_bytes: float,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    rows = [{"probes": encode_batch(batch)} for batch in make_batches(encoded, config.batch_size)]
    pool = ActorPool(
        config.num_actors,
        config.num_cpus_per_actor,
        config.num_gpus_per_actor,
        "a tracer's process",
        ModelError,
        memory_bytes,
        config.labels,
    )
    progress = ProgressLines("probes measured", len(encoded), report)
    measured = map_over_actors(pool, TracerActor, (model, config), rows, take="rows", progress=progress)
    return sorted(measured, key=lambda record: record["id"])


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    with writing_aside(path) as aside:
        pq.write_table(pa.Table.from_pylist([_plain(record) for record in records]), aside, compression="zstd")


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in record.items()}
