"""Per-probe measurements to a layer profile: group rows, their mean, intervals, and how stable the choice is.

Everything here is a function of the records that lie beside the profile (`layer_probes.parquet`), so any aggregate can
be made again, with another threshold, denominator or epsilon, without the model.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerplan.config.trace import TraceConfig
from layerplan.plan.boundary import compute_alignment_scores, find_best_boundary
from layerplan.plan.layer_profile import Interval, LayerProfile, ModelIdentity, SemanticProfile
from layerplan.tracer import measures
from layerplan.tracer.stability import check_stability

Array = NDArray[np.float64]
PLACEMENT = ("num_actors", "num_cpus_per_actor", "num_gpus_per_actor")
"""Options that say where a measurement runs and nothing about it; they are left out of the profile and its hash."""


def build_profile(
    records: list[dict[str, Any]], *, model: ModelIdentity, config: TraceConfig, probe_set_sha256: str
) -> LayerProfile:
    """Aggregates as the paper does: per probe, then the mean in each group, then the mean of the group rows.

    Args:
        records: One per probe, as `ProbeMeter` makes them or `read_records` reads them, in any order.
        model: The measured model.
        config: Trace options, recorded as they are but for where the measurement ran.
        probe_set_sha256: Hash of the probes.
    """
    records = sorted(records, key=lambda record: record["id"])
    groups = list(dict.fromkeys(record["group"] for record in records))
    group_of = np.array([groups.index(record["group"]) for record in records])
    log_prob, js = _stack(records, "log_prob"), _stack(records, "js")
    ratio = compute_ratio(log_prob, config)
    sensitivity = compute_sensitivity(js, config.sensitivity_eps)
    ratio_rows, sensitivity_rows = compute_group_means(ratio, group_of), compute_group_means(sensitivity, group_of)
    particle, layer_sensitivity = ratio_rows.mean(0), sensitivity_rows.mean(0)
    scores = compute_alignment_scores(particle.tolist(), layer_sensitivity.tolist())
    uncertainty, wins = _bootstrap(ratio, sensitivity, group_of, config)
    variants = {
        name: compute_sensitivity(_stack(records, column), config.sensitivity_eps)
        for name, column in (("top_k", "js_top_k_check"), ("mask", "js_mask_check"))
    }
    return LayerProfile(
        model=model,
        options=config.model_dump(mode="json", exclude=set(PLACEMENT)),
        probe_set_sha256=probe_set_sha256,
        groups=groups,
        num_probes=len(records),
        answered_share={
            name: float(np.mean([record["is_right"] for record in records if record["group"] == name]))
            for name in groups
        },
        task_particle=particle.tolist(),
        task_particle_rows=ratio_rows.tolist(),
        task_particle_median=np.median(ratio, axis=0).tolist(),
        task_particle_log=compute_group_means(np.abs(np.diff(log_prob, axis=1)), group_of).mean(0).tolist(),
        task_particle_interval=measures.find_longest_run(particle.tolist(), config.task_particle_threshold),
        task_particle_argmax=int(particle.argmax()),
        js=compute_group_means(js, group_of).mean(0).tolist(),
        layer_sensitivity=layer_sensitivity.tolist(),
        layer_sensitivity_rows=sensitivity_rows.tolist(),
        absolute_sensitivity=compute_group_means(np.abs(np.diff(js, axis=1)), group_of).mean(0).tolist(),
        alignment_score=scores,
        best_boundary=find_best_boundary(scores),
        semantic={kind: _semantic(_stack(records, f"deviation_{kind}")) for kind in measures.DEVIATIONS},
        uncertainty=uncertainty,
        boundary_win_share=wins,
        stability=check_stability(ratio, sensitivity, variants, group_of, seed=config.seed),
        measured_by={
            mask: dict(sorted(Counter(way for record in records if (way := record[f"way_{mask}"])).items()))
            for mask in ("mean", "zero")
        },
    ).sealed()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the per-probe values a measurement left."""
    import pyarrow.parquet as pq

    records: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return records


def compute_ratio(log_prob: Array, config: TraceConfig) -> Array:
    """Ratio(l), l = 1..L, per probe (Eq. 1), with the config's denominator: (N, L + 1) to (N, L)."""
    prob = torch.from_numpy(np.exp(log_prob).T.copy())
    ratio = measures.compute_task_particle(prob, config.ratio_denominator, config.task_particle_eps)
    return np.asarray(ratio.T.numpy())


def compute_sensitivity(js: Array, eps: float = measures.SENSITIVITY_EPS) -> Array:
    """LS(l), l = 1..L-1, per probe (Eq. 6): (N, L + 1) to (N, L - 1); LS(L) is 1 by construction and dropped."""
    return np.asarray(measures.compute_layer_sensitivity(torch.from_numpy(js.T.copy()), eps).T.numpy())[:, :-1]


def compute_group_means(values: Array, group_of: NDArray[Any]) -> Array:
    """Mean of the probes of each group: (N, ...) to (groups, ...)."""
    return np.stack([values[group_of == group].mean(0) for group in range(group_of.max() + 1)])


def _semantic(deviation: Array) -> SemanticProfile:
    mean = deviation.mean(0)
    gain = -np.diff(mean)
    return SemanticProfile(deviation=mean.tolist(), gain=gain.tolist(), eof_layer=int(gain.argmax()))


def _bootstrap(
    ratio: Array, sensitivity: Array, group_of: NDArray[Any], config: TraceConfig
) -> tuple[dict[str, list[Interval]], list[float]]:
    """Resamples probes within their groups: 95 % intervals, and how often each boundary wins."""
    rng = np.random.default_rng(config.seed)
    samples: dict[str, list[Array]] = {"task_particle": [], "layer_sensitivity": [], "alignment_score": []}
    wins = np.zeros(ratio.shape[1] - 1)
    members = [np.flatnonzero(group_of == group) for group in range(group_of.max() + 1)]
    for _ in range(config.bootstrap_samples):
        drawn = [rng.choice(indices, size=len(indices)) for indices in members]
        particle = np.mean([ratio[indices].mean(0) for indices in drawn], axis=0)
        sensitive = np.mean([sensitivity[indices].mean(0) for indices in drawn], axis=0)
        scores = compute_alignment_scores(particle.tolist(), sensitive.tolist())
        wins[find_best_boundary(scores) - 1] += 1
        for name, values in zip(samples, (particle, sensitive, np.array(scores))):
            samples[name].append(values)
    intervals = {name: _intervals(np.stack(values)) for name, values in samples.items()}
    return intervals, (wins / config.bootstrap_samples).tolist()


def _intervals(values: Array) -> list[Interval]:
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return [Interval(low=float(a), high=float(b)) for a, b in zip(low, high)]


def _stack(records: list[dict[str, Any]], column: str) -> Array:
    return np.stack([np.asarray(record[column], dtype=np.float64) for record in records])
