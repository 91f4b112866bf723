"""Whether the probes mean anything: copies, entropy, and right answers against wrong ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from layerplan.plan.describe import describe_measurement
from layerplan.tracer.answers import average_by_group, compare_answers
from layerplan.tracer.measures import compute_entropy
from tests.layer_profiles import make_profile
from tests.qwen3 import QWEN3_0P6B_IDENTITY

NUM_LAYERS = 8


def make_values(rng: np.random.Generator, group_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio and sensitivity per probe: noise, and a profile of its own for each group."""
    shapes = rng.random((group_of.max() + 1, 2 * NUM_LAYERS - 1)) * 5
    values = shapes[group_of] + rng.exponential(size=(len(group_of), 2 * NUM_LAYERS - 1))
    return values[:, :NUM_LAYERS], values[:, NUM_LAYERS:]


def test_entropy_is_scipys_and_0_and_log_v_at_its_ends() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    expected = entropy(torch.softmax(logits.double(), -1).numpy(), axis=1)
    assert compute_entropy(logits).numpy() == pytest.approx(expected, abs=1e-12)
    assert float(compute_entropy(torch.zeros(1, 8))) == pytest.approx(np.log(8))
    sure = torch.full((1, 8), -float("inf"))
    sure[0, 3] = 0
    assert float(compute_entropy(sure)) == 0.0


def test_averages_are_by_group_and_absent_when_a_record_lacks_the_column() -> None:
    records = [
        {"group": "b", "is_copy": True},
        {"group": "a", "is_copy": False},
        {"group": "b", "is_copy": False},
    ]
    assert average_by_group(records, "is_copy") == {"b": 0.5, "a": 0.0}
    assert average_by_group([*records, {"group": "a"}], "is_copy") == {}


def test_fewer_than_30_of_a_kind_in_mixed_groups_are_not_compared() -> None:
    rng = np.random.default_rng(0)
    group_of = np.repeat([0, 1], 50)
    ratio, sensitivity = make_values(rng, group_of)
    for right_in_first, right_in_second, is_compared in (
        (30, 0, False),
        (29, 0, False),
        (15, 15, True),
        (50, 29, False),
    ):
        is_right = np.zeros(100, dtype=bool)
        is_right[:right_in_first] = True
        is_right[50 : 50 + right_in_second] = True
        # 30 right and 20 wrong in the only mixed group: too few wrong; 50 + 29: the first group is of one kind
        assert (compare_answers(ratio, sensitivity, group_of, is_right, seed=0) is not None) is is_compared


def test_answers_that_measure_the_same_are_called_different_about_as_often_as_p_says() -> None:
    """Right answers stand in some groups more than in others, whose profiles differ: no difference within groups."""
    rng = np.random.default_rng(1)
    group_of = np.repeat(np.arange(4), 40)
    p_values = []
    for _ in range(100):
        ratio, sensitivity = make_values(rng, group_of)
        is_right = rng.random(160) < np.array([0.2, 0.4, 0.6, 0.8])[group_of]
        p_values.append(compare_answers(ratio, sensitivity, group_of, is_right, seed=0).p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.11  # 5 %, and three standard errors of 100 draws
    assert 0.35 < np.mean(p_values) < 0.65


def test_a_difference_within_groups_is_found_and_both_boundaries_are_named() -> None:
    rng = np.random.default_rng(2)
    group_of = np.repeat(np.arange(4), 40)
    ratio, sensitivity = rng.random((160, NUM_LAYERS)) * 0.1, rng.random((160, NUM_LAYERS - 1)) * 0.1
    is_right = rng.random(160) < 0.5
    for kind, boundary in ((True, 3), (False, 5)):
        rows = is_right == kind
        ratio[rows, boundary:] += 1
        sensitivity[rows, :boundary] += 1
    found = compare_answers(ratio, sensitivity, group_of, is_right, seed=0)
    assert found.p_value == 1 / 1000, "the measured assignment is one of a thousand"
    assert (found.right_boundary, found.wrong_boundary) == (3, 5)
    assert (found.num_right, found.num_wrong) == (is_right.sum(), 160 - is_right.sum())
    words = describe(num_right=80, right_and_wrong=found)
    assert "differ more than random assignments do (p = 0.001)" in words


def describe(**fields) -> str:
    profile = make_profile(
        QWEN3_0P6B_IDENTITY, [1.0] * 28, [1.0] * 27, groups=["a", "b"],
        **{"num_probes": 160, "answered_share": {"a": 0.5, "b": 0.5}, **fields},
    )  # fmt: skip
    return " ".join(describe_measurement(profile))


def test_the_share_of_right_answers_is_of_probes_also_where_groups_differ_in_size() -> None:
    found = describe(num_probes=6, answered_share={"a": 1.0, "b": 0.0}, num_right=5)
    assert "6 probes in 2 groups; the model answers 83% of them rightly (from 0% in b to 100% in a)" in found


def test_the_words_say_what_is_missing() -> None:
    assert "Too few right answers (4 of 160; 30 are needed): whether" in describe(num_right=4)
    assert "Too few wrong answers (1 of 160; 30 are needed): whether" in describe(num_right=159)
    assert "Too few groups hold both kinds: whether" in describe(num_right=80)
    shares = {"copied_share": {"a": 0.25, "b": 0.75}, "answer_entropy": {"a": 1.0, "b": 3.0}}
    assert (
        "stands in the context in 50% of the probes (from 25% in a to 75% in b); the entropy of the answer is 2.00 nats,"
        " 1.00 to 3.00 by group"
    ) in describe(num_right=80, **shares)
