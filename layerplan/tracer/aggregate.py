"""Per-probe measurements to a layer profile: group rows, their mean, intervals, and how stable the choice is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from layerplan.config.trace import TraceConfig
from layerplan.plan.boundary import compute_alignment_scores, find_best_boundary
from layerplan.plan.layer_profile import Interval, LayerProfile, ModelIdentity, SemanticProfile
from layerplan.tracer.measures import SENSITIVITY_EPS, find_longest_run

Array = NDArray[np.float64]


def build_profile(
    records: list[dict[str, Any]], *, model: ModelIdentity, config: TraceConfig, probe_set_sha256: str
) -> LayerProfile:
    """Aggregates as the paper does: per probe, then the mean in each group, then the mean of the group rows.

    Args:
        records: One per probe, as the tracer actors return them, in any order.
        model: The measured model.
        config: Trace options, recorded as they are.
        probe_set_sha256: Hash of the probes.
    """
    records = sorted(records, key=lambda record: record["id"])
    groups = list(dict.fromkeys(record["group"] for record in records))
    group_of = np.array([groups.index(record["group"]) for record in records])
    ratio = _stack(records, "task_particle")
    sensitivity = compute_sensitivity(_stack(records, "js"))
    ratio_rows, sensitivity_rows = _group_means(ratio, group_of), _group_means(sensitivity, group_of)
    particle, layer_sensitivity = ratio_rows.mean(0), sensitivity_rows.mean(0)
    scores = compute_alignment_scores(particle.tolist(), layer_sensitivity.tolist())
    js = _stack(records, "js")
    uncertainty, wins = _bootstrap(ratio, sensitivity, group_of, config)
    return LayerProfile(
        model=model,
        options=config.model_dump(mode="json"),
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
        task_particle_log=_group_means(_stack(records, "log_change"), group_of).mean(0).tolist(),
        task_particle_interval=find_longest_run(particle.tolist(), config.task_particle_threshold),
        task_particle_argmax=int(particle.argmax()),
        js=_group_means(js, group_of).mean(0).tolist(),
        layer_sensitivity=layer_sensitivity.tolist(),
        layer_sensitivity_rows=sensitivity_rows.tolist(),
        absolute_sensitivity=_group_means(np.abs(np.diff(js, axis=1)), group_of).mean(0).tolist(),
        alignment_score=scores,
        best_boundary=find_best_boundary(scores),
        semantic={kind: _semantic(_stack(records, f"deviation_{kind}")) for kind in ("cosine", "ce", "rank")},
        uncertainty=uncertainty,
        boundary_win_share=wins,
        stability=_check_stability(records, particle, layer_sensitivity, group_of),
    ).sealed()


def compute_sensitivity(js: Array) -> Array:
    """LS(l), l = 1..L-1, per probe (Eq. 6): (N, L + 1) to (N, L - 1); LS(L) is 1 by construction and dropped."""
    return (np.abs(np.diff(js, axis=1)) / (js[:, :-1] + SENSITIVITY_EPS))[:, :-1]


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


def _check_stability(
    records: list[dict[str, Any]], particle: Array, sensitivity: Array, group_of: NDArray[Any]
) -> dict[str, dict[str, float]]:
    """Rank correlation of the sensitivity profile with its variants, and the boundary each variant chooses."""
    checks = {}
    for name, column in (("top_k", "js_top_k_check"), ("mask", "js_mask_check")):
        variant = _group_means(compute_sensitivity(_stack(records, column)), group_of).mean(0)
        checks[name] = _compare(sensitivity, variant) | {"boundary": _boundary(particle, variant)}
    ratio, own = _stack(records, "task_particle"), compute_sensitivity(_stack(records, "js"))
    halves = [np.arange(len(records)) % 2 == side for side in (0, 1)]
    if all(half.any() for half in halves):
        first, second = (own[half].mean(0) for half in halves)
        ratios = [ratio[half].mean(0) for half in halves]
        checks["halves"] = _compare(first, second) | {
            "task_particle_correlation": _compare(*ratios)["correlation"],
            "boundary": _boundary(ratios[0], first),
            "other_boundary": _boundary(ratios[1], second),
        }
    return checks


def _compare(first: Array, second: Array) -> dict[str, float]:
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"correlation": 1.0 if np.allclose(first, second) else 0.0}
    return {"correlation": float(spearmanr(first, second).statistic)}


def _boundary(particle: Array, sensitivity: Array) -> float:
    return float(find_best_boundary(compute_alignment_scores(particle.tolist(), sensitivity.tolist())))


def _stack(records: list[dict[str, Any]], column: str) -> Array:
    return np.stack([np.asarray(record[column], dtype=np.float64) for record in records])


def _group_means(values: Array, group_of: NDArray[Any]) -> Array:
    return np.stack([values[group_of == group].mean(0) for group in range(group_of.max() + 1)])
