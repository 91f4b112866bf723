"""Scores of labels against scikit-learn, and their tests against SciPy and counts worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test
from sklearn.metrics import f1_score

from eval.label_scores import NONE, LabelScores, compare_labels, compare_seeds, score_labels
from layerplan.errors import EvaluationError


def draw(size: int, num_classes: int, right: float, seed: int) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, num_classes, size)
    guess = np.where(rng.random(size) < right, gold, rng.integers(NONE, num_classes, size))
    return gold.tolist(), guess.tolist()


@pytest.mark.parametrize(("size", "num_classes"), [(12, 3), (200, 6), (50, 2)])
def test_scores_are_scikit_learns_over_the_classes(size: int, num_classes: int) -> None:
    """Predictions that are no label are a class of their own for it, which is asked for no score."""
    gold, guess = draw(size, num_classes, 0.6, seed=size)
    found = score_labels(gold, guess, [str(n) for n in range(num_classes)], task="t", task_sha256="0")
    asked = {"labels": range(num_classes), "zero_division": 0}
    assert found.macro_f1 == pytest.approx(f1_score(gold, guess, average="macro", **asked))
    assert found.weighted_f1 == pytest.approx(f1_score(gold, guess, average="weighted", **asked))
    assert found.accuracy == pytest.approx(np.mean(np.equal(gold, guess)))
    assert found.num_no_label == guess.count(NONE) and sum(map(sum, found.confusion)) == size
    for metric in ("accuracy", "macro_f1", "weighted_f1"):
        low, high = found.intervals[metric]  # type: ignore[index]
        assert 0 <= low < getattr(found, metric) < high <= 1
    wilson = binomtest(round(found.accuracy * size), size).proportion_ci(method="wilson")
    assert found.intervals["accuracy"] == pytest.approx((wilson.low, wilson.high))


def test_a_test_of_mrpc_answered_with_its_larger_class_has_the_papers_0_399() -> None:
    """1,147 of its 1,725 pairs are paraphrases: the F1 of Table 3 is the macro F1."""
    found = score_labels([1] * 1147 + [0] * 578, [1] * 1725, ["no", "yes"], task="mrpc", task_sha256="0")
    assert round(found.macro_f1, 3) == 0.399
    assert round(found.accuracy, 3) == 0.665


def test_differences_are_tested_prompt_by_prompt() -> None:
    gold, first = draw(80, 3, 0.4, seed=1)
    _, second = draw(80, 3, 0.9, seed=1)
    found = compare_labels(gold, first, second, 3)
    right = np.equal(gold, first), np.equal(gold, second)
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    assert found["accuracy"].p_value == pytest.approx(binomtest(only[0], sum(only), 0.5).pvalue)
    assert found["accuracy"].difference == pytest.approx((only[1] - only[0]) / 80)
    for metric, average in (("macro_f1", "macro"), ("weighted_f1", "weighted")):

        def differ(one: np.ndarray, two: np.ndarray, average: str = average) -> float:
            options = {"labels": range(3), "average": average, "zero_division": 0}
            return float(f1_score(gold, two, **options) - f1_score(gold, one, **options))

        theirs = permutation_test(
            (np.array(first), np.array(second)), differ, permutation_type="samples", n_resamples=100, rng=0
        )
        verdict = found[metric]  # type: ignore[index]
        assert verdict.difference == pytest.approx(theirs.statistic)
        assert verdict.p_value == pytest.approx(theirs.pvalue, abs=0.05)
        assert verdict.interval[0] < verdict.difference < verdict.interval[1]


def test_equal_predictions_are_no_evidence() -> None:
    gold, guess = draw(40, 2, 0.7, seed=3)
    assert all(verdict.p_value == 1 for verdict in compare_labels(gold, guess, guess, 2).values())


def test_intervals_hold_their_estimates_with_few_prompts_of_a_class() -> None:
    """A drawn test of two prompts a class lacks an eighth of the classes; all right is 1, and no better known than Wilson's."""
    gold = [place for place in range(50) for _ in range(2)]
    found = score_labels(gold, gold, [str(place) for place in range(50)], task="t", task_sha256="0")
    wilson = binomtest(100, 100).proportion_ci(method="wilson")
    assert found.macro_f1 == 1.0 and found.intervals["macro_f1"] == pytest.approx((wilson.low, 1.0))
    wrong = [(place + 1) % 50 for place in gold]
    verdict = compare_labels(gold, wrong, gold, 50)["macro_f1"]
    assert verdict.difference == 1.0 and 0.9 < verdict.interval[0] < verdict.interval[1] == 1.0


@pytest.mark.parametrize("size", [30, 100])
def test_intervals_of_macro_f1_cover_where_a_class_is_rare(size: int) -> None:
    """Of 30 prompts a class of 5 % has none in a fifth of tests, and no right answer in a half: no variance, but no knowledge."""
    rng, draws = np.random.default_rng(size), 200

    def ask(count: int) -> tuple[list[int], list[int]]:
        gold = rng.choice(3, count, p=(0.8, 0.15, 0.05))
        is_known = rng.random(count) < np.array([0.9, 0.7, 0.5])[gold]
        return gold.tolist(), np.where(is_known, gold, rng.choice(3, count, p=(0.8, 0.15, 0.05))).tolist()

    def score(count: int) -> LabelScores:
        return score_labels(*ask(count), ["a", "b", "c"], task="t", task_sha256="0")

    truth = score(100_000).macro_f1
    intervals = [score(size).intervals["macro_f1"] for _ in range(draws)]
    missed = sum(not low <= truth <= high for low, high in intervals)
    assert missed <= 0.1 * draws


@pytest.mark.parametrize(("size", "num_classes"), [(60, 4), (100, 20)])
def test_intervals_cover_what_more_prompts_would_show(size: int, num_classes: int) -> None:
    rng, draws = np.random.default_rng(size), 150

    def ask(count: int) -> tuple[list[int], list[int]]:
        gold = rng.integers(0, num_classes, count)
        guess = np.where(rng.random(count) < 0.8, gold, rng.integers(0, num_classes, count))
        return gold.tolist(), guess.tolist()

    names = [str(place) for place in range(num_classes)]
    truth = score_labels(*ask(50_000), names, task="t", task_sha256="0")
    missed = {"macro_f1": 0, "weighted_f1": 0}
    for _ in range(draws):
        found = score_labels(*ask(size), names, task="t", task_sha256="0")
        for metric in missed:
            low, high = found.intervals[metric]  # type: ignore[index]
            assert low <= getattr(found, metric) <= high
            missed[metric] += not low <= getattr(truth, metric) <= high
    assert max(missed.values()) / draws <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def test_exchanges_follow_the_number_of_tests() -> None:
    """All wrong beside all right, by 3 metrics of base and 12 arms: 234 tests, and each of them is told."""
    gold = [place % 4 for place in range(200)]
    wrong = [(place + 1) % 4 for place in gold]
    found = compare_seeds(gold, [wrong, wrong], [gold, gold], 4, num_tests=234)
    assert max(234 * verdict.p_value for verdict in found.values()) < 0.05
    alone = compare_seeds(gold, [wrong, wrong], [gold, gold], 4)
    assert [verdict.p_value for verdict in alone.values()] == [1 / 2001] * 3


def test_equal_methods_are_seldom_told_apart() -> None:
    rng, draws, told = np.random.default_rng(9), 150, []
    for seed in range(draws):
        gold = rng.integers(0, 4, 60)
        first, second = (np.where(rng.random(60) < 0.7, gold, rng.integers(0, 4, 60)).tolist() for _ in range(2))
        found = compare_labels(gold.tolist(), first, second, 4, seed=seed)
        told.append([verdict.p_value < 0.05 for verdict in found.values()])
    assert np.mean(told, axis=0).max() <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def test_a_test_with_prompts_missing_is_no_test() -> None:
    with pytest.raises(EvaluationError, match="3 predictions for 4 prompts"):
        score_labels([0, 1, 0, 1], [0, 1, 0], ["a", "b"], task="t", task_sha256="0")


def test_seeds_are_no_more_prompts_than_there_are() -> None:
    """The same predictions three times over are the same evidence as once."""
    gold, first = draw(40, 2, 0.5, seed=5)
    _, second = draw(40, 2, 0.8, seed=5)
    once, thrice = (compare_seeds(gold, [first] * times, [second] * times, 2)["macro_f1"] for times in (1, 3))
    assert thrice.p_value == once.p_value
    assert (*thrice.interval, thrice.difference) == pytest.approx((*once.interval, once.difference))
    with pytest.raises(EvaluationError, match="1 seeds compared with 2"):
        compare_seeds(gold, [first, first], [second], 2)
