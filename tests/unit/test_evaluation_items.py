"""Prompts byte for byte, and benchmark folders that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.items import Question, load_benchmark
from eval.prompts import format_prompt
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.errors import EvaluationError

QUESTION = Question(
    "law/1", "law", "法学", "Social Science", "下列说法{正确}的是____。 ", ("甲 ", "乙", "丙", "丁"), "C"
)


def write_benchmark(root: Path, rows: str, *, category: str = "Humanities", header: str | None = None) -> Path:
    (root / "val").mkdir(parents=True)
    (root / "subjects.json").write_text(json.dumps({"law": {"name_zh": "法学", "category": category}}))
    (root / "val" / "law.csv").write_text((header or "id,question,A,B,C,D,answer") + "\n" + rows, encoding="utf-8")
    return root


def load(root: Path, **options: object) -> object:
    return load_benchmark(BenchmarkConfig(name="ceval", path=str(root), **options))


def test_the_ceval_prompt_is_the_authors_byte_for_byte() -> None:
    assert format_prompt("ceval", QUESTION) == (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n下列说法{正确}的是____。 \n"
        "A. 甲 \nB. 乙\nC. 丙\nD. 丁\n答案："
    )


def test_the_cmmlu_prompt_is_the_authors_byte_for_byte() -> None:
    assert format_prompt("cmmlu", QUESTION) == (
        "以下是关于法学的单项选择题，请直接给出正确答案的选项。\n\n题目：下列说法{正确}的是____。 \n"
        "A. 甲 \nB. 乙\nC. 丙\nD. 丁\n答案是："
    )


def test_the_builtin_set_is_balanced_and_complete() -> None:
    benchmark = load_benchmark(BenchmarkConfig(name="ceval", path="builtin"))
    assert len(benchmark.questions) == 64
    assert len(benchmark.subjects) == 4
    for letter in "ABCD":
        assert 12 <= sum(question.answer == letter for question in benchmark.questions) <= 20
    assert len({question.question for question in benchmark.questions}) == 64


@pytest.mark.parametrize(("name", "questions", "subjects"), [("ceval", 1346, 52), ("cmmlu", 11582, 67)])
def test_the_real_benchmarks_are_whole(data_dir: Path, name: str, questions: int, subjects: int) -> None:
    benchmark = load_benchmark(BenchmarkConfig(name=name, path=str(data_dir / name)))
    assert (len(benchmark.questions), len(benchmark.subjects)) == (questions, subjects)


def test_a_real_benchmark_with_a_subject_missing_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    subjects = json.loads((data_dir / "ceval" / "subjects.json").read_text())
    for subject in subjects:
        source = data_dir / "ceval" / "val" / f"{subject}.csv"
        (tmp_path / "val" / source.name).write_bytes(source.read_bytes())
    (tmp_path / "subjects.json").write_text(json.dumps(subjects))
    (tmp_path / "val" / "law.csv").unlink()
    with pytest.raises(EvaluationError, match=r"law\.csv: does not exist; every subject"):
        load(tmp_path)
    subjects.pop("law")
    (tmp_path / "subjects.json").write_text(json.dumps(subjects))
    with pytest.raises(EvaluationError, match="has 52 subjects and 1346 questions, this folder 51 and"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ("", {}, r"law\.csv: holds no question"),
        ("1,q,a,b,c,d,E\n", {}, "question 1: answer 'E' is not one of A, B, C, D"),
        ("1,q,a,b,c,d,\n", {}, "question 1: answer '' is not one of"),
        ("1,q,a,b,c,d\n", {"header": "id,question,A,B,C,D"}, "has no column answer; an unlabelled split"),
        ("1,q,a,b,c,d,A\n", {"category": "Magic"}, "needs name_zh and a category out of STEM"),
    ],
)
def test_a_malformed_folder_is_one_clear_error(tmp_path: Path, rows: str, options: dict[str, str], words: str) -> None:
    root = write_benchmark(tmp_path / "bench", rows, **options)
    with pytest.raises(EvaluationError, match=words):
        load(root, max_questions=1)


def test_a_folder_without_subjects_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"nowhere does not exist; a folder of CSV files is expected"):
        load(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match=r"val/accountant\.csv: does not exist; every subject must have its file"):
        load(tmp_path)
