"""TP, JS, LS and S of a decoder that has them in closed form, through the whole measurement and aggregation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_decoder import CONTEXT_TOKEN, QUERY_TOKEN, AnalyticForCausalLM

from layerplan.config.trace import TraceConfig
from layerplan.plan.boundary import compute_alignment_scores
from layerplan.plan.describe import describe_certainty, describe_measurement
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.tracer.aggregate import build_profile
from layerplan.tracer.encode import EncodedProbe
from layerplan.tracer.meter import ProbeMeter
from layerplan.tracer.model_runner import LayerRunner

SHALLOW_READER = (0.5, 0.2, 0.02, 0.01)
DEEP_READER = (0.01, 0.02, 0.2, 0.5)


def make_probe(name: str, num_context: int, gold_id: int = 0) -> EncodedProbe:
    ids = (CONTEXT_TOKEN,) * num_context + (QUERY_TOKEN,) * 2
    context = (True,) * num_context + (False,) * 2
    return EncodedProbe(f"{name}/{num_context}", name, ids, context, gold_id)


def measure(weights: tuple[float, ...], probes: list[EncodedProbe], **options: object) -> LayerProfile:
    config = TraceConfig(js_top_k=0, js_top_k_check=0, bootstrap_samples=50, **options)
    with torch.random.fork_rng(devices=[]):
        meter = ProbeMeter(LayerRunner(AnalyticForCausalLM(weights)), config)
    records = [record for probe in probes for record in meter.measure([probe])]
    identity = ModelIdentity(name="analytic", model_type="analytic", num_layers=len(weights))
    return build_profile(records, model=identity, config=config, probe_set_sha256="0")


def prob(weights: tuple[float, ...], num_context: int) -> list[float]:
    return [1 / (1 + 2 * math.exp(-num_context * sum(weights[:k]))) for k in range(len(weights) + 1)]


def divergence(p: float, q: float) -> float:
    def kl(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


@pytest.mark.parametrize("weights", [SHALLOW_READER, DEEP_READER])
def test_every_profile_has_its_closed_form(weights: tuple[float, ...]) -> None:
    profile = measure(weights, [make_probe("a", 3), make_probe("b", 4)])
    particle, sensitivity, divergences = [], [], []
    for count in (3, 4):
        p = prob(weights, count)
        js = [divergence(p[-1], value) for value in p]
        particle.append([abs(p[k] - p[k - 1]) / (p[k] + 1e-8) for k in range(1, 5)])
        sensitivity.append([abs(js[k] - js[k - 1]) / (js[k - 1] + 1e-4) for k in range(1, 4)])
        divergences.append(js)
    assert profile.task_particle == pytest.approx(np.mean(particle, 0).tolist(), abs=1e-6)
    assert profile.js == pytest.approx(np.mean(divergences, 0).tolist(), abs=1e-7)
    assert profile.layer_sensitivity == pytest.approx(np.mean(sensitivity, 0).tolist(), abs=1e-4)
    expected = compute_alignment_scores(np.mean(particle, 0), np.mean(sensitivity, 0)).tolist()
    assert profile.alignment_score == pytest.approx(expected, abs=1e-3)
    assert profile.answered_share == {"a": 1.0, "b": 1.0}
    assert profile.task_particle_argmax == particle[0].index(max(particle[0]))


def test_a_mean_mask_changes_nothing_where_only_the_sum_of_the_context_counts() -> None:
    profile = measure(DEEP_READER, [make_probe("a", 4)], mask="mean")
    assert max(profile.js) < 1e-12
    # the zero mask is then the variant, and says something else
    assert profile.stability["mask"]["sensitivity_correlation"] < 1


def test_the_options_change_what_they_name() -> None:
    plain = measure(DEEP_READER, [make_probe("a", 3)])
    p = prob(DEEP_READER, 3)
    previous = measure(DEEP_READER, [make_probe("a", 3)], ratio_denominator="previous")
    assert previous.task_particle == pytest.approx([abs(p[i + 1] - p[i]) / (p[i] + 1e-8) for i in range(4)], abs=1e-6)
    eased = measure(DEEP_READER, [make_probe("a", 3)], task_particle_eps=1.0)
    assert eased.task_particle == pytest.approx([abs(p[i + 1] - p[i]) / (p[i + 1] + 1) for i in range(4)], abs=1e-6)
    loose = measure(DEEP_READER, [make_probe("a", 3)], sensitivity_eps=10.0)
    js = [divergence(p[-1], value) for value in p]
    assert loose.layer_sensitivity == pytest.approx([abs(js[i + 1] - js[i]) / (js[i] + 10) for i in range(3)], abs=1e-7)
    low = measure(DEEP_READER, [make_probe("a", 3)], task_particle_threshold=0.15)
    ratio = np.array(plain.task_particle)
    start, end = low.task_particle_interval
    assert end > start and (ratio[start:end] > 0.15).all()
    for profile, name in ((previous, "ratio_denominator"), (eased, "task_particle_eps"), (loose, "sensitivity_eps")):
        assert profile.options[name] != plain.options[name] and profile.sha256 != plain.sha256
    assert "num_actors" not in plain.options, "where a measurement ran is not part of what was measured"


def test_equal_probes_are_stable_and_four_layers_are_no_evidence_all_the_same() -> None:
    profile = measure(DEEP_READER, [make_probe("a", 3), make_probe("b", 3)])
    assert profile.probe_stability == {"change_point": [0.0, 1.0], "paper": profile.probe_stability["paper"]}
    assert sorted(profile.probe_stability["paper"]) == [0.0, 1.0]
    for interval in profile.uncertainty["alignment_score"]:
        assert interval.high - interval.low < 1e-9
    words = " ".join([*describe_measurement(profile), *describe_certainty(profile)])
    assert "2 probes in 2 groups; the model answers 100% of them rightly" in words
    assert "The best boundary is 2" in words and "chosen in 100% of bootstrap resamples of the probes" in words
    assert "the measurement supports no boundary" in words
    assert "which are alike, since groups hold a single probe" in words and "95 % interval" not in words
    twice = measure(DEEP_READER, [replace(make_probe("a", 3), id=name, group="a") for name in "ab"])
    words = " ".join([*describe_measurement(twice), *describe_certainty(twice)])
    assert "single probe" not in words and "95 % interval" in words


def test_the_answers_are_described_by_group() -> None:
    # the answer is token 0 with p = 1 / (1 + 2 / e^(3 * 0.73)), the other two share the rest; it stands in no context
    profile = measure(DEEP_READER, [make_probe("a", 3), make_probe("b", 3, gold_id=1)])
    assert profile.answered_share == {"a": 1.0, "b": 0.0} and profile.num_right == 1
    assert profile.copied_share == {"a": 0.0, "b": 0.0}
    p = prob(DEEP_READER, 3)[-1]
    expected = -p * math.log(p) - (1 - p) * math.log((1 - p) / 2)
    assert profile.answer_entropy["a"] == pytest.approx(expected, abs=1e-6)
    # a context that speaks against label 0 leaves label 1 first, whose token is the one the context is made of
    assert measure((-0.5, -0.2, -0.1, -0.1), [make_probe("a", 3)]).copied_share == {"a": 1.0}
    words = " ".join(describe_measurement(profile))
    assert "Too few right answers (1 of 2; 30 are needed) and too few wrong answers (1 of 2; 30 are needed)" in words


def test_absolute_sensitivity_is_the_change_of_the_divergence_itself() -> None:
    profile = measure(DEEP_READER, [make_probe("a", 3)], sensitivity="absolute")
    js = [divergence(prob(DEEP_READER, 3)[-1], value) for value in prob(DEEP_READER, 3)]
    absolute = [abs(js[i + 1] - js[i]) for i in range(4)]
    assert profile.absolute_sensitivity == pytest.approx(absolute, abs=1e-7)
    relative = measure(DEEP_READER, [make_probe("a", 3)])
    assert relative.layer_sensitivity == profile.layer_sensitivity
    expected = compute_alignment_scores(profile.task_particle, absolute[:3])
    assert profile.alignment_score == pytest.approx(expected.tolist(), abs=1e-4)
    assert profile.alignment_score != relative.alignment_score
