"""Benchmarks as values: questions with their subject, category, choices and key, read from CSV folders.

A folder holds `subjects.json` (name, Chinese name, category of each subject) and `<split>/<subject>.csv` with the
columns id, question, A, B, C, D, answer. The project's own small set has the same layout.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from layerplan.config.evaluation import BenchmarkConfig
from layerplan.errors import EvaluationError
from layerplan.plan.hashing import compute_sha256

LETTERS = ("A", "B", "C", "D")
CATEGORIES = ("STEM", "Social Science", "Humanities", "Other")
DEFAULT_SPLIT = {"ceval": "val", "cmmlu": "test"}
OFFICIAL_COUNTS = {("ceval", "val"): (52, 1346), ("cmmlu", "test"): (67, 11582)}
COLUMNS = ("id", "question", *LETTERS, "answer")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question."""

    id: str
    subject: str
    subject_zh: str
    category: str
    question: str
    choices: tuple[str, str, str, str]
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """A labelled split of a benchmark, in subject and file order."""

    name: str
    split: str
    questions: tuple[Question, ...]
    is_official: bool

    @property
    def content_sha256(self) -> str:
        """Hash over every question, its choices and key."""
        return compute_sha256([[item.id, item.question, *item.choices, item.answer] for item in self.questions])

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subject names in order."""
        return tuple(dict.fromkeys(item.subject for item in self.questions))


def load_benchmark(config: BenchmarkConfig) -> Benchmark:
    """Reads a benchmark whole; a subject that is missing, short or unlabelled is an error.

    Raises:
        EvaluationError: Naming the file or subject and what is expected.
    """
    if config.path == "builtin":
        root, split = Path(str(resources.files("eval").joinpath("data/builtin"))), "val"
    else:
        root, split = Path(config.path).expanduser(), config.split or DEFAULT_SPLIT[config.name]
    subjects = _read_subjects(root, config.name)
    questions: list[Question] = []
    for subject in sorted(subjects):
        found = _read_subject(root / split / f"{subject}.csv", subject, subjects[subject])
        questions += found[: config.max_questions]
    benchmark = Benchmark(config.name, split, tuple(questions), is_official=config.path != "builtin")
    if benchmark.is_official and config.max_questions is None:
        _check_counts(benchmark, root)
    return benchmark


def _read_subjects(root: Path, name: str) -> dict[str, dict[str, Any]]:
    path = root / "subjects.json"
    try:
        subjects = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(
            f"evaluation.benchmarks: {name}: {path} does not exist; a folder of CSV files is expected"
        ) from None
    except (OSError, ValueError) as error:
        raise EvaluationError(f"evaluation.benchmarks: {name}: {path} cannot be read ({error})") from None
    for subject, values in subjects.items():
        if values.get("category") not in CATEGORIES or not values.get("name_zh"):
            raise EvaluationError(
                f"{path}: subject {subject} needs name_zh and a category out of {', '.join(CATEGORIES)}"
            )
    return dict(subjects)


def _read_subject(path: Path, subject: str, values: dict[str, Any]) -> list[Question]:
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
    except FileNotFoundError:
        raise EvaluationError(f"{path}: does not exist; every subject of subjects.json must have its file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise EvaluationError(f"{path}: holds no question")
    missing = [column for column in COLUMNS if column not in rows[0]]
    if missing:
        raise EvaluationError(f"{path}: has no column {', '.join(missing)}; an unlabelled split cannot be scored")
    return [_make_question(row, path, subject, values) for row in rows]


def _make_question(row: dict[str, str], path: Path, subject: str, values: dict[str, Any]) -> Question:
    answer = (row["answer"] or "").strip()
    if answer not in LETTERS:
        raise EvaluationError(f"{path}: question {row['id']}: answer {answer!r} is not one of {', '.join(LETTERS)}")
    return Question(
        id=f"{subject}/{row['id']}",
        subject=subject,
        subject_zh=values["name_zh"],
        category=values["category"],
        question=row["question"],
        choices=(row["A"], row["B"], row["C"], row["D"]),
        answer=answer,
    )


def _check_counts(benchmark: Benchmark, root: Path) -> None:
    expected = OFFICIAL_COUNTS.get((benchmark.name, benchmark.split))
    found = (len(benchmark.subjects), len(benchmark.questions))
    if expected is not None and found != expected:
        raise EvaluationError(
            f"{root}: {benchmark.name} {benchmark.split} has {expected[0]} subjects and {expected[1]} questions,"
            f" this folder {found[0]} and {found[1]}"
        )
