"""Per-probe measurements to a layer profile: group rows, their mean, intervals, and how stable the choice is.

Everything here is a function of the records that lie beside the profile (`layer_probes.parquet`), so any aggregate can
be made again, with another threshold, denominator or epsilon, without the model.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerplan.config.plan import DEFAULT_MIN_SIDE
from layerplan.config.trace import TraceConfig
from layerplan.plan.boundary import RULES, compute_alignment_scores, find_best_boundary, list_candidates
from layerplan.plan.layer_profile import Interval, LayerProfile, ModelIdentity, SemanticProfile
from layerplan.tracer import measures
from layerplan.tracer.answers import average_by_group, compare_answers
from layerplan.tracer.stability import check_stability

Array = NDArray[np.float64]
PLACEMENT = ("num_actors", "num_cpus_per_actor", "num_gpus_per_actor", "labels")
"""Options that say where a measurement runs and nothing about it; they are left out of the profile and its hash."""


def build_profile(
    records: list[dict[str, Any]], *, model: ModelIdentity, config: TraceConfig, probe_set_sha256: str
) -> LayerProfile:
    """Aggregates as the paper does: per probe, then the mean in each group, then the mean of the group rows.

    Args:
        records: One per probe, as `ProbeMeter` makes them or `layer_probes.parquet` holds them, in any order.
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
    scored = choose_sensitivity(js, config)
    scores = compute_alignment_scores(particle, compute_group_means(scored, group_of).mean(0)).tolist()
    uncertainty, stability = _bootstrap(ratio, sensitivity, scored, group_of, config)
    variants = {
        name: choose_sensitivity(_stack(records, column), config)
        for name, column in (("top_k", "js_top_k_check"), ("mask", "js_mask_check"))
    }
    return LayerProfile(
        model=model,
        options=config.model_dump(mode="json", exclude=set(PLACEMENT)),
        probe_set_sha256=probe_set_sha256,
        groups=groups,
        num_probes=len(records),
        answered_share=average_by_group(records, "is_right"),
        num_right=sum(bool(record["is_right"]) for record in records),
        copied_share=average_by_group(records, "is_copy"),
        answer_entropy=average_by_group(records, "entropy"),
        right_and_wrong=compare_answers(
            ratio, scored, group_of, np.array([bool(record["is_right"]) for record in records]), seed=config.seed
        ),
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
        best_boundary=1 + scores.index(max(scores)) if scores else None,
        semantic={kind: _semantic(_stack(records, f"deviation_{kind}")) for kind in measures.DEVIATIONS},
        uncertainty=uncertainty,
        probe_stability=stability,
        stability=check_stability(ratio, scored, variants, group_of, seed=config.seed),
        measured_by={
            mask: dict(sorted(Counter(way for record in records if (way := record[f"way_{mask}"])).items()))
            for mask in ("mean", "zero")
        },
    ).sealed()


def compute_ratio(log_prob: Array, config: TraceConfig) -> Array:
    """Ratio(l), l = 1..L, per probe (Eq. 1), with the config's denominator: (N, L + 1) to (N, L)."""
    prob = torch.from_numpy(np.exp(log_prob).T.copy())
    ratio = measures.compute_task_particle(prob, config.ratio_denominator, config.task_particle_eps)
    return np.asarray(ratio.T.numpy())


def compute_sensitivity(js: Array, eps: float = measures.SENSITIVITY_EPS) -> Array:
    """LS(l), l = 1..L-1, per probe (Eq. 6): (N, L + 1) to (N, L - 1); LS(L) is 1 by construction and dropped."""
    return np.asarray(measures.compute_layer_sensitivity(torch.from_numpy(js.T.copy()), eps).T.numpy())[:, :-1]


def choose_sensitivity(js: Array, config: TraceConfig) -> Array:
    """The sensitivity that S(k) is made of, l = 1..L-1, per probe: (N, L + 1) to (N, L - 1)."""
    if config.sensitivity == "absolute":
        return np.abs(np.diff(js, axis=1))[:, :-1]
    return compute_sensitivity(js, config.sensitivity_eps)


def compute_group_means(values: Array, group_of: NDArray[Any]) -> Array:
    """Mean of the probes of each group: (N, ...) to (groups, ...)."""
    return np.stack([values[group_of == group].mean(0) for group in range(group_of.max() + 1)])


def _semantic(deviation: Array) -> SemanticProfile:
    mean = deviation.mean(0)
    gain = -np.diff(mean)
    return SemanticProfile(deviation=mean.tolist(), gain=gain.tolist(), eof_layer=int(gain.argmax()))


def _bootstrap(
    ratio: Array, sensitivity: Array, scored: Array, group_of: NDArray[Any], config: TraceConfig
) -> tuple[dict[str, list[Interval]], dict[str, list[float]]]:
    """Resamples probes within their groups: 95 % intervals, and how often each rule chooses each boundary."""
    rng = np.random.default_rng(config.seed)
    members = [np.flatnonzero(group_of == group) for group in range(group_of.max() + 1)]
    means: dict[str, list[Array]] = {"task_particle": [], "layer_sensitivity": [], "scored": []}
    for _ in range(config.bootstrap_samples):
        drawn = [rng.choice(indices, size=len(indices)) for indices in members]
        for name, values in zip(means, (ratio, sensitivity, scored)):
            means[name].append(np.mean([values[indices].mean(0) for indices in drawn], axis=0))
    samples = {name: np.stack(values) for name, values in means.items()}
    scores = compute_alignment_scores(samples["task_particle"], samples.pop("scored"))
    num_layers = ratio.shape[1]
    shares: dict[str, list[float]] = {
        rule: (
            np.bincount(find_best_boundary(scores, num_layers, rule, DEFAULT_MIN_SIDE), minlength=num_layers - 1)[1:]
            / len(scores)
        ).tolist()
        for rule in RULES
        if list_candidates(num_layers, rule, DEFAULT_MIN_SIDE)
    }
    return {name: _intervals(values) for name, values in {**samples, "alignment_score": scores}.items()}, shares


def _intervals(values: Array) -> list[Interval]:
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return [Interval(low=float(a), high=float(b)) for a, b in zip(low, high)]


def _stack(records: list[dict[str, Any]], column: str) -> Array:
    return np.stack([np.asarray(record[column], dtype=np.float64) for record in records])
