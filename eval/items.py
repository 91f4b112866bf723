"""Benchmarks as values: questions with their subject, category, choices and key, read from CSV folders.

A folder holds `subjects.json` (name, Chinese name, category of each subject; where it is missing the official map is
used) and `<split>/<subject>.csv`, or `<split>/<subject>_<split>.csv` as in C-Eval's archive, with the columns id, question, A, B,
C, D, answer (`eval/csv_table.py`). The project's own small set has the same layout, and what comes from the hub is cached
in it (`eval/hub.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.csv_table import LETTERS, read_letter, read_table
from eval.subjects import DATA, load_official_subjects
from layerplan.artifacts import compute_sha256
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.errors import EvaluationError
from layerplan.inside import is_plain_name

CATEGORIES = ("STEM", "Social Science", "Humanities", "Other")
DEFAULT_SPLIT = {"ceval": "val", "cmmlu": "test"}
EXAMPLES_SPLIT = "dev"


@dataclass(frozen=True)
class OfficialSplit:
    """What a whole split is known by."""

    num_questions: int
    num_subjects_by_category: tuple[int, int, int, int]
    """In the order of CATEGORIES."""
    content_sha256: str
    """Of the questions as their authors published them."""


OFFICIAL = {
    ("ceval", "val"): OfficialSplit(
        1346, (20, 10, 11, 11), "6e3184a041203096009a64ac15ee7066ebd20dcf937ccf68a2a5d215fd75fe78"
    ),
    ("cmmlu", "test"): OfficialSplit(
        11582, (17, 22, 13, 15), "932ff312983c0c0c4efeb26d870969841d0ef4c52b0932f5ad3d698b213210d2"
    ),
}


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
    is_china_specific: bool = False
    """A tag of CMMLU's that overlaps the four categories."""


@dataclass(frozen=True)
class Benchmark:
    """A labelled split of a benchmark, in subject and file order."""

    name: str
    split: str
    questions: tuple[Question, ...]
    is_official: bool
    examples: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)
    """Solved questions of each subject's `dev` file, for few-shot prompts."""

    @cached_property
    def content_sha256(self) -> str:
        """Hash over every question, its choices and key."""
        return compute_sha256([[item.id, item.question, *item.choices, item.answer] for item in self.questions])

    @property
    def subjects(self) -> tuple[str, ...]:
        """Subject names in order."""
        return tuple(dict.fromkeys(item.subject for item in self.questions))


def load_benchmark(config: BenchmarkConfig, *, num_few_shot: int = 0) -> Benchmark:
    """Reads a benchmark whole; a subject that is missing, short or unlabelled is an error.

    Args:
        config: Which benchmark, and where it lies.
        num_few_shot: Solved examples to read per subject from the `dev` split.

    Raises:
        EvaluationError: Naming the file or subject and what is expected.
    """
    split = config.split or DEFAULT_SPLIT[config.name]
    root = Path(config.path).expanduser()
    if config.path == "builtin":
        root, split = DATA / "builtin", "val"
    elif config.path == "hub":
        from eval.hub import fetch_benchmark

        root = fetch_benchmark(config.name, splits=(split, EXAMPLES_SPLIT))
    subjects = _read_subjects(root, config.name)
    questions: list[Question] = []
    for subject in sorted(subjects):
        found = _read_subject(root / split, subject, subjects[subject])
        questions += found[: config.max_questions]
    examples = {subject: _read_examples(root, subject, subjects[subject], num_few_shot) for subject in sorted(subjects)}
    benchmark = Benchmark(
        config.name,
        split,
        tuple(questions),
        is_official=config.path != "builtin",
        examples=examples if num_few_shot else {},
    )
    if benchmark.is_official and config.max_questions is None:
        _check_whole(benchmark, root, config.content_sha256)
    return benchmark


def _read_subjects(root: Path, name: str) -> dict[str, dict[str, Any]]:
    path = root / "subjects.json"
    if not root.is_dir():
        raise EvaluationError(
            f"evaluation.benchmarks: {name}: {root} does not exist; a folder of CSV files is expected"
        )
    if not path.exists():
        return load_official_subjects(name)
    try:
        subjects = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"evaluation.benchmarks: {name}: {path} cannot be read ({error})") from None
    for subject, values in subjects.items():
        if not is_plain_name(subject):
            raise EvaluationError(f"{path}: subject {subject!r} is no name of a file in {root / '<split>'}")
        if values.get("category") not in CATEGORIES or not values.get("name_zh"):
            raise EvaluationError(
                f"{path}: subject {subject} needs name_zh and a category out of {', '.join(CATEGORIES)}"
            )
    return dict(subjects)


def _read_subject(folder: Path, subject: str, values: dict[str, Any]) -> list[Question]:
    path, other = folder / f"{subject}.csv", folder / f"{subject}_{folder.name}.csv"
    path = other if other.exists() and not path.exists() else path
    return [_make_question(row, path, subject, values) for row in read_table(path)]


def _read_examples(root: Path, subject: str, values: dict[str, Any], count: int) -> tuple[Question, ...]:
    """The first `count` solved questions of a subject's `dev` file."""
    if count == 0:
        return ()
    found = _read_subject(root / EXAMPLES_SPLIT, subject, values)
    if len(found) < count:
        raise EvaluationError(
            f"{root / EXAMPLES_SPLIT}: {subject} has {len(found)} solved questions, evaluation.num_few_shot={count}"
        )
    return tuple(found[:count])


def _make_question(row: dict[str, str], path: Path, subject: str, values: dict[str, Any]) -> Question:
    answer = read_letter(row["answer"])
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
        is_china_specific=bool(values.get("china_specific", False)),
    )


def _check_whole(benchmark: Benchmark, root: Path, wanted_sha256: str) -> None:
    """Subjects, questions, categories and content of an official split are what its authors published."""
    official = OFFICIAL.get((benchmark.name, benchmark.split))
    if official is None:
        return
    name = f"{root}: {benchmark.name} {benchmark.split}"
    by_subject = Counter(item.subject for item in benchmark.questions)
    expected = (sum(official.num_subjects_by_category), official.num_questions)
    if (len(by_subject), len(benchmark.questions)) != expected:
        raise EvaluationError(
            f"{name} has {expected[0]} subjects and {expected[1]} questions,"
            f" this folder {len(by_subject)} and {len(benchmark.questions)}"
        )
    category_of = {item.subject: item.category for item in benchmark.questions}
    counts = Counter(category_of.values())
    if tuple(counts[category] for category in CATEGORIES) != official.num_subjects_by_category:
        wanted = ", ".join(f"{size} {name}" for name, size in zip(CATEGORIES, official.num_subjects_by_category))
        raise EvaluationError(f"{name} has subjects in {wanted}; this folder's subjects.json has {dict(counts)}")
    expected_sha256 = official.content_sha256 if wanted_sha256 == "official" else wanted_sha256
    if expected_sha256 not in ("any", benchmark.content_sha256):
        raise EvaluationError(
            f"{name}: the content hash is {benchmark.content_sha256}, expected {expected_sha256}; questions, choices or"
            " keys were changed. Set the benchmark's content_sha256 to this hash or to `any` to score it all the same"
        )
