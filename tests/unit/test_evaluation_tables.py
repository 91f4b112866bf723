"""Tables in the paper's layout, and verdicts from a paper's printed numbers, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.items import CATEGORIES, Benchmark, Question
from eval.printed import KEYS, PAPER, compute_average, find_best_letter, judge_printed, render_page
from eval.scoring import Answer, EvaluationResult, score_answers
from eval.tables import render_scores
from layerplan.errors import EvaluationError

ROOT = Path(__file__).resolve().parents[2]


def make_result(right: int, *, protocol: str = "logit", protocol_id: str = "p", repeats: int = 1) -> EvaluationResult:
    """Four subjects of five questions, one per category; the first `right` questions of each are answered rightly."""
    questions = tuple(
        Question(
            f"{category}/{index}", category, category, category, "q", ("a", "b", "c", "d"), "A", category == "Other"
        )
        for category in CATEGORIES
        for index in range(5)
    )
    answers = [
        Answer(id=item.id, prompt="", output="", predicted="A" if index % 5 < right else "B", answer="A")
        for index, item in enumerate(questions)
    ]
    benchmark = Benchmark("ceval", "val", questions, is_official=False)
    return score_answers(benchmark, protocol, protocol_id, [answers] * repeats)  # type: ignore[arg-type]


def test_the_packages_own_questions_are_not_called_c_eval() -> None:
    question = Question("q", "python_language", "Python", "STEM", "q", ("a", "b", "c", "d"), "A", False)
    answer = Answer(id="q", prompt="", output="", predicted="A", answer="A")
    own = score_answers(Benchmark("ceval", "val", (question,), is_official=False), "logit", "p", [[answer]])
    assert "built-in questions (format of C-Eval), accuracy" in render_scores({"base": {"ceval/logit": own}})
    assert "built-in" not in render_scores({"base": {"ceval/logit": make_result(1)}})


def test_a_table_has_the_papers_columns_and_one_row_per_model() -> None:
    base = {"ceval/generate": make_result(1, protocol="generate"), "ceval/logit": make_result(2, repeats=5)}
    trained = {"ceval/generate": make_result(3, protocol="generate"), "ceval/logit": make_result(4, repeats=5)}
    lines = render_scores({"base": base, "freeze_deep": trained}).splitlines()
    assert lines[2].startswith("| Models | STEM | Social Science | Humanities | Other | Average |")
    assert lines[4].startswith(
        "| base | 20.00 / 40.00 | 20.00 / 40.00 | 20.00 / 40.00 | 20.00 / 40.00 | 20.00 / 40.00 |"
    )
    assert lines[5].startswith("| freeze_deep | 60.00 / 80.00 |")
    assert lines[5].endswith("| – / 0.00 |"), "five equal repeats have a standard deviation of zero, one has none"


def test_a_latex_table_escapes_what_latex_reads() -> None:
    text = render_scores({r"a_b & 50% \x": {"ceval/logit": make_result(2)}}, style="latex")
    assert r"a\_b \& 50\% \textbackslash{}x & -- / 40.00" in text
    assert text.count(r"\\") == 2 and r"\begin{tabular}{lcccccccc}" in text


def test_unequal_protocols_are_not_put_into_one_table() -> None:
    models = {"base": {"ceval/logit": make_result(1)}, "run": {"ceval/logit": make_result(1, protocol_id="q")}}
    with pytest.raises(EvaluationError, match="ceval/logit: unequal protocol ids cannot be put in one table"):
        render_scores(models)


def test_china_specific_subjects_are_a_tag_beside_the_categories() -> None:
    result = make_result(2)
    assert result.china_specific == pytest.approx(40.0)
    assert set(result.categories) == set(CATEGORIES)


def test_repeats_report_their_deviation_and_the_questions_that_changed() -> None:
    first, second = make_result(2), make_result(3)
    assert first.repeat_std is None
    questions = tuple(
        Question(f"law/{index}", "law", "法学", "Humanities", "q", ("a", "b", "c", "d"), "A") for index in range(4)
    )
    benchmark = Benchmark("ceval", "val", questions, is_official=False)

    def answer(letters: str) -> list[Answer]:
        return [
            Answer(id=item.id, prompt="", output="", predicted=letter, answer="A")
            for item, letter in zip(questions, letters)
        ]

    result = score_answers(benchmark, "logit", "p", [answer("AABB"), answer("ABBB")])
    assert result.repeats == (50.0, 25.0)
    assert result.num_unstable == 1
    assert result.repeat_std == pytest.approx(17.6777, abs=1e-4)  # |50 - 25| / sqrt(2)
    assert second.repeats == (60.0,)


def test_the_average_of_printed_categories_and_its_error() -> None:
    average, error = compute_average("C-Eval", (25.0, 25.0, 25.0, 25.0))
    assert average == 25.0
    # 25 * 75 * (1/430 + 1/275 + 1/257 + 1/384) / 16
    assert error == pytest.approx((1875 * (1 / 430 + 1 / 275 + 1 / 257 + 1 / 384) / 16) ** 0.5)


def test_two_of_the_papers_three_ceval_arms_are_guessing() -> None:
    verdicts, pairs = judge_printed(PAPER)
    guessing = {(item.protocol, item.arm) for item in verdicts if item.benchmark == "C-Eval" and item.chance_p >= 0.05}
    assert guessing == {(protocol, arm) for protocol in ("generate", "logit") for arm in ("full", "freeze_shallow")}
    assert len(verdicts) == 12 and len(pairs) == 12
    assert find_best_letter("C-Eval") == ("D", pytest.approx(26.16, abs=0.01))


def test_the_docs_page_is_what_the_tool_says_now() -> None:
    assert (ROOT / "docs" / "paper_verdict.md").read_text(encoding="utf-8") == render_page()


def test_the_key_counts_are_those_of_the_real_benchmarks(data_dir: Path) -> None:
    from eval.items import LETTERS, load_benchmark
    from layerplan.config.evaluation import BenchmarkConfig

    for title, name in (("C-Eval", "ceval"), ("CMMLU", "cmmlu")):
        questions = load_benchmark(BenchmarkConfig(name=name, path=str(data_dir / name))).questions
        counted = tuple(
            tuple(sum(item.category == category and item.answer == letter for item in questions) for letter in LETTERS)
            for category in CATEGORIES
        )
        assert counted == KEYS[title]
