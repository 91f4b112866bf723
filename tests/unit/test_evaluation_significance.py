"""Intervals, tests and verdicts against numbers worked out by hand, and against scipy where it has the test."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import binomtest

from eval.items import Benchmark, Question
from eval.scoring import Answer, EvaluationResult, pick_letter, score_answers
from eval.significance import (
    compute_mcnemar,
    compute_wilson,
    correct_holm,
    judge_comparisons,
)
from layerplan.errors import EvaluationError
from layerplan.plan.estimate import estimate_pooled


def make_benchmark(sizes: dict[str, tuple[str, int]]) -> Benchmark:
    questions = [
        Question(f"{subject}/{index}", subject, subject, category, "q", ("a", "b", "c", "d"), "ABCD"[index % 4])
        for subject, (category, size) in sizes.items()
        for index in range(size)
    ]
    return Benchmark("ceval", "val", tuple(questions), is_official=False)


def make_run(
    benchmark: Benchmark, right: set[int], *, protocol_id: str = "p", unparsed: frozenset[int] = frozenset()
) -> tuple[EvaluationResult, list[Answer]]:
    answers = []
    for index, question in enumerate(benchmark.questions):
        wrong = "B" if question.answer == "A" else "A"
        predicted = question.answer if index in right else None if index in unparsed else wrong
        answers.append(Answer(id=question.id, prompt="", output="", predicted=predicted, answer=question.answer))
    return score_answers(benchmark, "generate", protocol_id, [answers]), answers


def test_wilson_interval_of_one_in_four() -> None:
    # p = 1/4, n = 100, z = 1.96: centre (0.25 + 0.019207) / 1.038415, spread 0.087098 / 1.038415
    low, high = compute_wilson(25, 100)
    assert (low, high) == pytest.approx((17.55, 34.30), abs=0.01)
    assert compute_wilson(0, 64)[0] == 0.0
    assert compute_wilson(64, 64)[1] == 100.0


def test_mcnemar_is_the_exact_sign_test_on_the_discordant_pairs() -> None:
    assert compute_mcnemar(0, 0) == 1.0
    assert compute_mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert compute_mcnemar(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert compute_mcnemar(4, 4) == 1.0
    for first, second in ((3, 17), (20, 31), (100, 60)):
        assert compute_mcnemar(first, second) == pytest.approx(binomtest(first, first + second, 0.5).pvalue)


def test_holm_steps_down_and_keeps_the_order() -> None:
    assert correct_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert correct_holm([0.6, 0.9]) == [1.0, 1.0]
    assert correct_holm([]) == []


def test_an_interval_keeps_subjects_apart() -> None:
    # within each subject every difference is the same, so that questions drawn inside subjects have no variance at all
    differences = np.array([[1.0] * 10 + [0.0] * 30])
    assert estimate_pooled(differences, strata=["law"] * 10 + ["art"] * 30).interval() == pytest.approx((0.25, 0.25))
    low, high = estimate_pooled(differences).interval()
    assert low < 0.20 and high > 0.30


def test_the_three_averages_differ_as_they_should() -> None:
    benchmark = make_benchmark({"law": ("Social Science", 10), "art": ("Humanities", 2), "music": ("Humanities", 4)})
    result, _ = make_run(benchmark, set(range(5)) | {10, 11})
    # law 50 %, art 100 %, music 0 %: categories 50 and 50, subjects (50 + 100 + 0) / 3, questions 7 of 16
    assert result.category_mean == pytest.approx(50)
    assert result.subject_mean == pytest.approx(50)
    assert result.question_mean == pytest.approx(100 * 7 / 16)
    assert result.subjects == {"law": (5, 10), "art": (2, 2), "music": (0, 4)}


def test_counts_that_do_not_add_up_are_refused() -> None:
    benchmark = make_benchmark({"law": ("Social Science", 4)})
    result, _ = make_run(benchmark, {0}, unparsed=frozenset({1}))
    assert (result.num_correct, result.num_wrong, result.num_unparsed) == (1, 2, 1)
    with pytest.raises(ValidationError, match="is not asked 5"):
        EvaluationResult.model_validate({**result.model_dump(), "num_asked": 5})


def test_a_tie_takes_the_first_letter() -> None:
    assert pick_letter([-1.0, -1.0, -2.0, -3.0]) == "A"
    assert pick_letter([-3.0, -1.0, -2.0, -1.0]) == "B"


def test_verdicts_are_paired_corrected_and_put_into_words() -> None:
    benchmark = make_benchmark({"law": ("Social Science", 100), "art": ("Humanities", 100)})
    base = ("the base", *make_run(benchmark, set(range(0, 200, 4))))  # 50 right
    better = ("better", *make_run(benchmark, set(range(0, 200, 4)) | set(range(1, 120, 4))))  # 30 more, none lost
    same = ("same", *make_run(benchmark, set(range(1, 200, 4))))  # 50 right, all others
    first, second = judge_comparisons([([base], [better]), ([base], [same])])
    assert first.difference == pytest.approx(15)
    assert first.p_value == pytest.approx(2 / 2**30)
    assert first.adjusted_p == pytest.approx(4 / 2**30)
    assert first.sentence.startswith("better is better than the base (+15.0 [95 %: ")
    assert second.p_value == 1.0
    assert "not distinguishable from the base" in second.sentence
    assert second.sentence.endswith("no better than guessing.")


@pytest.mark.parametrize("size", [4, 60])
def test_answers_that_are_all_the_same_leave_room_for_what_was_not_asked(size: int) -> None:
    """Clopper and Pearson's upper bound for none of n, either way."""
    benchmark = make_benchmark({"law": ("Social Science", size)})
    base, same = ([(name, *make_run(benchmark, set(range(size // 2))))] for name in ("the base", "the same"))
    (verdict,) = judge_comparisons([(base, same)])
    most = 100 * binomtest(0, size).proportion_ci(0.95, "exact").high
    assert verdict.difference_interval == pytest.approx((-most, most))
    assert verdict.p_value == 1.0


def test_subjects_whose_questions_all_moved_alike_leave_room_for_what_was_not_asked() -> None:
    """Clopper and Pearson's bounds where every question moved; wider than what was seen where only whole subjects did."""
    for size, is_told in ((2, False), (5, False), (6, True)):
        benchmark = make_benchmark({"law": ("Social Science", size)})
        (verdict,) = judge_comparisons(
            [([("the base", *make_run(benchmark, set()))], [("run", *make_run(benchmark, set(range(size))))])]
        )
        least = binomtest(size, size).proportion_ci(0.95, "exact").low  # of the share that got better
        assert verdict.difference_interval == pytest.approx((100 * (2 * least - 1), 100))
        assert (verdict.difference_interval[0] > 0) == is_told == (verdict.p_value < 0.05)
    subjects = make_benchmark(dict.fromkeys(("a", "b", "c", "d"), ("Humanities", 4)))
    base, run = make_run(subjects, set()), make_run(subjects, set(range(4)))  # all of the first, none of the others
    (verdict,) = judge_comparisons([([("the base", *base)], [("run", *run)])])
    most = 1 - 0.025 ** (1 / 16)
    assert verdict.p_value == 2 / 2**4
    assert verdict.difference_interval == pytest.approx((25 - 200 * most, 25 + 100 * most))


def test_a_run_that_always_says_one_letter_is_not_better_than_guessing() -> None:
    questions = [
        Question(f"law/{index}", "law", "law", "Humanities", "q", ("a", "b", "c", "d"), "A" if index % 2 else "B")
        for index in range(200)
    ]
    benchmark = Benchmark("ceval", "val", tuple(questions), is_official=False)
    run = make_run(benchmark, set(range(1, 200, 2)))  # always "A" where the key is A: 50 %
    (verdict,) = judge_comparisons([([("the base", *run)], [("constant", *run)])])
    assert verdict.chance_p < 1e-10
    assert verdict.constant_letter_p > 0.4
    assert "not better than always answering one letter" in verdict.sentence


def test_unequal_protocols_cannot_be_compared() -> None:
    benchmark = make_benchmark({"law": ("Social Science", 4)})
    base, other = make_run(benchmark, {0}), make_run(benchmark, {1}, protocol_id="q")
    with pytest.raises(EvaluationError, match="protocol ids q and p differ"):
        judge_comparisons([([("the base", *base)], [("run", *other)])])


def test_seeds_of_one_condition_are_pooled_into_one_verdict() -> None:
    benchmark = make_benchmark({"law": ("Social Science", 100), "art": ("Humanities", 100)})
    base = ("the base", *make_run(benchmark, set(range(0, 200, 4))))
    seeds = [("deep", *make_run(benchmark, set(range(0, 200, 4)) | set(range(1, stop, 4)))) for stop in (100, 120, 140)]
    (verdict,) = judge_comparisons([([base], seeds)])
    assert (verdict.num_seeds, verdict.num_questions) == (3, 200)
    assert verdict.difference == pytest.approx(15.0)  # 25, 30 and 35 more of 200
    assert verdict.test == "seeds and questions, Cochran-Cox"
    assert 1e-4 < verdict.p_value < 0.05
    assert verdict.difference_interval[0] < 15 < verdict.difference_interval[1]
    assert verdict.sentence.startswith("deep (3 seeds) is better than the base (+15.0 [95 %: ")


def test_two_conditions_of_several_seeds_are_compared_with_each_other() -> None:
    benchmark = make_benchmark({"law": ("Social Science", 200)})
    low = [("shallow", *make_run(benchmark, set(range(stop)))) for stop in (48, 50, 52)]
    high = [("deep", *make_run(benchmark, set(range(stop)))) for stop in (118, 122)]
    (verdict,) = judge_comparisons([(low, high)])
    assert (verdict.num_reference_seeds, verdict.num_seeds) == (3, 2)
    assert (verdict.reference_accuracy, verdict.accuracy) == pytest.approx((25.0, 60.0))
    assert verdict.sentence.startswith("deep (2 seeds) is better than shallow (3 seeds) (+35.0 [95 %: ")
    (back,) = judge_comparisons([(high, low)])
    assert back.difference == pytest.approx(-35.0)
    assert back.p_value == pytest.approx(verdict.p_value, rel=0.2)


@pytest.mark.parametrize("num_seeds", [2, 3])
def test_pooled_tests_reject_no_true_difference_about_as_often_as_they_say(num_seeds: int) -> None:
    """Seeds that differ by 3 points and change a tenth of the answers; 200 conditions without a true difference."""
    rng = np.random.default_rng(num_seeds)
    rejected = 0
    for _ in range(200):
        chance = 1 / (1 + np.exp(-rng.normal(size=60)))
        base = (rng.random(60) < chance).astype(float)
        shift = rng.normal(0, 0.03, (num_seeds, 1)) / 0.1
        again = (rng.random((num_seeds, 60)) < np.clip(chance + shift, 0, 1)).astype(float)
        seeds = np.where(rng.random((num_seeds, 60)) < 0.1, again, base)
        rejected += estimate_pooled(seeds - base).p_different() < 0.05
    assert rejected <= 18, "more than 9 % at a level of 5 %"


def test_scores_against_guessing_are_corrected_over_what_is_judged() -> None:
    """34 of 100 against 25 %: p = 0.027 alone, and four runs are judged, each compared with several others."""
    benchmark = make_benchmark({"law": ("Social Science", 100)})
    alone = binomtest(34, 100, 0.25, alternative="greater").pvalue
    runs = [[(f"run{place}", *make_run(benchmark, set(range(34))))] for place in range(4)]
    (verdict,) = judge_comparisons([(runs[0], runs[1])])
    assert verdict.chance_p == pytest.approx(alone) and "guessing" not in verdict.sentence
    verdicts = judge_comparisons([(one, other) for place, one in enumerate(runs) for other in runs[place + 1 :]])
    assert [verdict.chance_p for verdict in verdicts] == pytest.approx([3 * alone] * 6), "three of the four are judged"
    assert all(verdict.sentence.endswith("no better than guessing.") for verdict in verdicts)


def test_one_more_right_of_eight_subjects_is_no_finding() -> None:
    benchmark = make_benchmark({f"subject{place}": ("Humanities", 1) for place in range(8)})
    base = ("the base", *make_run(benchmark, set()))
    (verdict,) = judge_comparisons([([base], [("a", *make_run(benchmark, {0})), ("b", *make_run(benchmark, {0}))])])
    assert verdict.p_value > 0.3
    assert verdict.difference_interval[0] < 0 < verdict.difference_interval[1]


def test_files_of_other_questions_cannot_be_paired() -> None:
    benchmark = make_benchmark({"law": ("Social Science", 4)})
    base = ("the base", *make_run(benchmark, {0}))
    result, answers = make_run(benchmark, {1})
    with pytest.raises(EvaluationError, match="do not hold the same questions"):
        judge_comparisons([([base], [("run", result, answers[:-1])])])
