"""The papers' formulas on inputs whose answer is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from layerplan.config.trace import TraceConfig
from layerplan.models.semantic_bases import SemanticBases
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.tracer.aggregate import build_profile, compute_sensitivity
from layerplan.tracer.encode import is_in_context
from layerplan.tracer.lexicon import load_builtin_lexicon
from layerplan.tracer.measures import (
    compute_deviations,
    compute_js,
    compute_layer_sensitivity,
    compute_task_particle,
    find_longest_run,
)
from layerplan.tracer.probes import GROUPS, load_probes, make_probes

INFINITY = 1e4


def test_task_particle_is_the_change_over_the_new_probability() -> None:
    prob = torch.tensor([[0.1], [0.2], [0.8], [0.4]])
    assert compute_task_particle(prob)[:, 0].tolist() == pytest.approx([0.5, 0.75, 1.0], rel=1e-6)
    assert compute_task_particle(prob, "previous")[:, 0].tolist() == pytest.approx([1.0, 3.0, 0.5], rel=1e-6)


def test_js_is_zero_for_equal_and_ln_2_for_disjoint_distributions() -> None:
    first = torch.tensor([[INFINITY, 0.0, 0.0, 0.0]])
    second = torch.tensor([[0.0, INFINITY, 0.0, 0.0]])
    assert float(compute_js(first, first, 0)) == 0.0
    assert float(compute_js(first, second, 0)) == pytest.approx(math.log(2), abs=1e-12)
    assert float(compute_js(first, second, 1)) == pytest.approx(math.log(2), abs=1e-12)


def test_js_on_the_top_k_union_is_renormalised() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.1, 0.1]]), torch.tensor([[0.3, 0.5, 0.1, 0.1]])
    # top-1 of each: entries 0 and 1, renormalised to (5/8, 3/8) and (3/8, 5/8), whose middle is (1/2, 1/2)
    expected = 5 / 8 * math.log(5 / 4) + 3 / 8 * math.log(3 / 4)
    assert float(compute_js(p.log(), q.log(), 1)) == pytest.approx(expected, abs=1e-7)


def test_js_agrees_with_scipy_over_the_whole_vocabulary() -> None:
    from scipy.spatial.distance import jensenshannon

    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = torch.softmax(logits, -1).numpy()
    assert float(compute_js(logits[:1], logits[1:], 0)) == pytest.approx(jensenshannon(p, q) ** 2, abs=1e-12)


def test_layer_sensitivity_compares_with_the_layer_before() -> None:
    js = torch.tensor([[0.4], [0.3], [0.3], [0.0]], dtype=torch.float64)
    expected = [0.1 / 0.4001, 0.0, 0.3 / 0.3001]
    assert compute_layer_sensitivity(js)[:, 0].tolist() == pytest.approx(expected)
    # LS(L) is 1 by construction, and profiles drop it
    assert compute_sensitivity(js.T.numpy())[0].tolist() == pytest.approx(expected[:2])


def test_the_longest_run_is_half_open_and_the_first_on_a_tie() -> None:
    assert find_longest_run([0.6, 0.1, 0.9, 0.9, 0.2, 0.7, 0.7], 0.5) == (2, 4)
    assert find_longest_run([0.1, 0.2], 0.5) == (0, 0)
    assert find_longest_run([0.9], 0.5) == (0, 1)


def test_the_output_basis_is_a_row_of_the_pseudo_inverse() -> None:
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 7, 39])
    expected = np.linalg.pinv(weight.double().numpy()).T[labels.numpy()]
    assert np.abs(SemanticBases(weight).compute(weight[labels]).numpy() - expected).max() < 1e-9


def test_cross_entropy_and_rank_are_taken_over_the_labels_bases() -> None:
    """SALF, Algorithm 1, by hand: the head stretches label 0, so its row attracts and its basis does not."""
    weight = torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    bases = [(1 / 3, 0.0), (-1.0, 1.0)]  # columns of the inverse of a square head
    state = (1.0, 1.0)
    logits = [sum(a * b for a, b in zip(state, basis)) / math.hypot(*state) / math.hypot(*basis) for basis in bases]
    assert logits == pytest.approx([math.sqrt(0.5), 0.0])
    for label, rank in ((0, 0), (1, 1)):
        found = compute_deviations(SemanticBases(weight), torch.tensor([state]), torch.tensor([label]))
        expected = math.log(sum(math.exp(value) for value in logits)) - logits[label]
        assert float(found["ce"]) == pytest.approx(expected, abs=1e-6) and float(found["rank"]) == rank
        assert float(found["cosine"]) == pytest.approx(1 - logits[label], abs=1e-6)
    # by the head's rows label 1 would be (0, 1), as near as sqrt(1/2), and the cross-entropy another
    assert logits[1] != pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deviations_equal_the_papers_definition_on_an_ill_conditioned_head(dtype: torch.dtype) -> None:
    """Directions of the head differ in length by 1,000, as real heads' do by 100."""
    generator = torch.Generator().manual_seed(5)
    stretch = torch.logspace(-1.5, 1.5, 24)
    weight = (torch.randn(300, 24, generator=generator) * stretch).to(dtype)
    states, labels = torch.randn(6, 24, generator=generator), torch.randint(300, (6,), generator=generator)
    bases = np.linalg.pinv(weight.double().numpy()).T
    found = compute_deviations(SemanticBases(weight), states, labels)
    for row, (state, label) in enumerate(zip(states.double().numpy(), labels.tolist())):
        near = bases @ state / np.linalg.norm(bases, axis=1) / np.linalg.norm(state)
        assert float(found["cosine"][row]) == pytest.approx(1 - near[label], abs=1e-5)
        assert float(found["ce"][row]) == pytest.approx(np.log(np.exp(near).sum()) - near[label], abs=1e-5)
        assert float(found["rank"][row]) == (near > near[label]).sum()


def test_deviations_of_a_state_that_points_at_its_label() -> None:
    bases, label = SemanticBases(torch.eye(4)), torch.tensor([2])
    aligned = compute_deviations(bases, torch.tensor([[0.0, 0, 5, 0]]), label)
    assert float(aligned["cosine"]) == pytest.approx(0.0, abs=1e-12)
    assert float(aligned["rank"]) == 0
    assert float(aligned["ce"]) == pytest.approx(math.log(math.e + 3) - 1)
    away = compute_deviations(bases, torch.tensor([[3.0, 4, 0, 0]]), label)
    assert float(away["cosine"]) == pytest.approx(1.0)
    assert float(away["rank"]) == 2


def test_a_token_is_context_when_its_stripped_span_ends_before_the_query() -> None:
    prompt = "Example:good->Bad, no-Yes; Query:bad->"
    end = prompt.index("Query:")
    assert is_in_context(prompt, 0, 7, end)
    assert is_in_context(prompt, end - 2, end, end)  # "; " ends where the query begins
    assert not is_in_context(prompt, end - 1, end, end)  # white space alone belongs to neither
    assert not is_in_context(prompt, end - 1, end + 5, end)  # " Query" straddles
    assert not is_in_context(prompt, 0, 0, end)  # a special token has no span


def test_probes_have_the_papers_surface_form_and_are_a_function_of_the_seed() -> None:
    lexicon = load_builtin_lexicon()
    probes = make_probes(lexicon, per_group=50, style="mixed", seed=0)
    assert [probe.id for probe in probes] == [f"{group.name}/{i:03d}" for group in GROUPS for i in range(50)]
    for probe in probes:
        assert probe.prompt.count("->") == 2 and probe.prompt.startswith("Example:") and probe.prompt.endswith("->")
        assert probe.prompt[probe.context_end :].startswith("Query:")
    assert probes == make_probes(lexicon, per_group=50, style="mixed", seed=0)
    assert probes != make_probes(lexicon, per_group=50, style="mixed", seed=1)
    assert all(probe.prompt.count("->") == 3 for probe in make_probes(lexicon, per_group=2, style="uniform", seed=0))


def test_the_query_is_never_one_of_its_own_examples() -> None:
    for probe in make_probes(load_builtin_lexicon(), per_group=50, style="uniform", seed=4):
        examples, query = probe.prompt[: probe.context_end], probe.prompt[probe.context_end + len("Query:") : -2]
        assert f":{query}->" not in examples and f" {query}->" not in examples, probe.prompt


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "x", "group": "g", "prompt": "Example:a->b; Query:", "answer": "c"}', "probe x: its query is empty"),
        ('{"id": "x", "group": "g", "prompt": "Query:a->", "answer": "c"}', "probe x: has no context"),
        ('{"id": "x", "group": "g", "prompt": "a->"}', "id, group, prompt and answer are expected"),
        ("not json", "id, group, prompt and answer are expected"),
        ("", "holds no probe"),
    ],
)
def test_a_bad_probe_is_named(tmp_path, line: str, words: str) -> None:
    from layerplan.errors import ProbeError

    path = tmp_path / "probes.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ProbeError, match=words):
        load_probes(path)


def test_a_profile_is_the_mean_of_group_means_in_any_order() -> None:
    def record(name: str, group: str, ratio: list[float], js: list[float]) -> dict:
        deviation = {f"deviation_{kind}": [3.0, 1.0, 0.5, 0.0] for kind in ("cosine", "ce", "rank")}
        checks = {"js_top_k_check": js, "js_mask_check": js, "way_zero": "sweep", "way_mean": "sweep"}
        # the P(l) whose Ratio is asked for, from the last layer back: P(l-1) = P(l) (1 - Ratio(l))
        prob = [0.9]
        for value in reversed(ratio):
            prob.insert(0, prob[0] * (1 - value))
        log_prob = [math.log(value) for value in prob]
        return {"id": name, "group": group, "is_right": True, "log_prob": log_prob, "js": js, **deviation, **checks}

    records = [
        record("a/0", "a", [0.0, 0.0, 0.5], [0.4, 0.2, 0.1, 0.0]),
        record("a/1", "a", [0.0, 0.2, 0.5], [0.4, 0.2, 0.1, 0.0]),
        record("b/0", "b", [0.0, 0.3, 0.4], [0.4, 0.4, 0.1, 0.0]),
    ]
    identity = ModelIdentity(name="m", model_type="qwen3", num_layers=3)
    config = TraceConfig(bootstrap_samples=10, task_particle_threshold=0.4)
    profile = build_profile(records, model=identity, config=config, probe_set_sha256="0")
    assert profile.task_particle == pytest.approx([0.0, 0.2, 0.45])  # ((0 + 0.2)/2 + 0.3)/2, (0.5 + 0.4)/2
    assert profile.layer_sensitivity == pytest.approx([(0.2 / 0.4001) / 2, (0.1 / 0.2001 + 0.3 / 0.4001) / 2])
    assert profile.task_particle_argmax == 2
    assert profile.task_particle_interval == (2, 3)
    assert profile.semantic["cosine"].eof_layer == 0
    # S(1) = [0 - 1] + [mean(4/9, 1) - 0]; at k = 2 the deep side has no LS
    assert profile.alignment_score == pytest.approx([-1 + (4 / 9 + 1) / 2])
    assert profile.best_boundary == 1 and profile.probe_stability == {"paper": [1.0]}
    assert profile.copied_share == {} and profile.answer_entropy == {}, "records of an older tracer do not say"
    shuffled = build_profile(records[::-1], model=identity, config=config, probe_set_sha256="0")
    assert shuffled.sha256 == profile.sha256

    unchecked = [{**item, "js_mask_check": [math.nan] * 4, "way_mean": ""} for item in records]
    some = build_profile([records[0], *unchecked[1:]], model=identity, config=config, probe_set_sha256="0")
    assert some.stability["mask"]["num_probes"] == 1 and some.stability["top_k"]["num_probes"] == 3
    assert some.measured_by == {"zero": {"sweep": 3}, "mean": {"sweep": 1}}
    assert some.alignment_score == profile.alignment_score
    none = build_profile(unchecked, model=identity, config=config, probe_set_sha256="0")
    assert "mask" not in none.stability and none.measured_by["mean"] == {}
