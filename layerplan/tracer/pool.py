"""Probes through a Ray Data actor pool of tracer replicas, to a profile on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from layerplan.config.trace import TraceConfig
from layerplan.errors import ModelError, ProbeError
from layerplan.models.files import identify_model
from layerplan.plan.layer_profile import LayerProfile
from layerplan.tracer.actor import TracerActor
from layerplan.tracer.aggregate import build_profile
from layerplan.tracer.lexicon import load_antsynnet, load_builtin_lexicon
from layerplan.tracer.probes import Probe, hash_probes, load_probes, make_probes

PROFILE_NAME = "layer_profile.json"
PROBES_NAME = "layer_probes.parquet"


def trace_model(
    model_name: str,
    config: TraceConfig,
    *,
    out_dir: Path,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> LayerProfile:
    """Measures the layers of a model; writes `layer_profile.json` and the per-probe values beside it.

    Ray must be initialised. Per-probe values are kept, so any aggregate can be recomputed without the model.

    Raises:
        ProbeError: When a probe is malformed or does not fit the model.
        ModelError: When the model cannot be traced.
    """
    probes = collect_probes(config)
    model = identify_model(model_name, revision=revision)
    if model.num_layers < 2:
        raise ModelError(f"model.name={model_name}: has {model.num_layers} layer; tracing needs at least 2")
    records = _measure(probes, model_name, revision, trust_remote_code, config)
    missing = {probe.id for probe in probes} - {record["id"] for record in records}
    if missing or len(records) != len(probes):
        raise ProbeError(f"tracing: {len(records)} results for {len(probes)} probes; missing {sorted(missing)[:3]}")
    profile = build_profile(records, model=model, config=config, probe_set_sha256=hash_probes(probes))
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_records(out_dir / PROBES_NAME, records)
    profile.save(out_dir / PROFILE_NAME)
    return profile


def collect_probes(config: TraceConfig) -> list[Probe]:
    """The probes the config names.

    Raises:
        ProbeError: When they cannot be read.
    """
    path = Path(config.probes).expanduser()
    if config.probes.endswith(".jsonl"):
        return load_probes(path)
    if config.probes == "builtin":
        lexicon = load_builtin_lexicon()
    elif path.is_dir():
        lexicon = load_antsynnet(path)
    else:
        raise ProbeError(f"trace.probes={config.probes}: expected `builtin`, a folder or a .jsonl file")
    return make_probes(lexicon, per_group=config.probes_per_group, style=config.probe_style, seed=config.seed)


def _measure(
    probes: list[Probe], model_name: str, revision: str, trust_remote_code: bool, config: TraceConfig
) -> list[dict[str, Any]]:
    import ray

    rows = [vars(probe) for probe in sorted(probes, key=lambda probe: (len(probe.prompt), probe.id))]
    batches = -(-len(rows) // config.batch_size)
    measured = ray.data.from_items(rows, override_num_blocks=batches).map_batches(
        TracerActor,
        fn_constructor_args=(model_name, revision, trust_remote_code, config),
        batch_size=config.batch_size,
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, batches)),
        num_cpus=config.num_cpus_per_actor,
        num_gpus=config.num_gpus_per_actor,
    )
    records: list[dict[str, Any]] = measured.take_all()
    return sorted(records, key=lambda record: record["id"])


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist([_plain(record) for record in records]), partial, compression="zstd")
    partial.replace(path)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in record.items()}
