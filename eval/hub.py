"""Benchmarks from the Hugging Face hub through `datasets`, kept as the CSV folders everything else reads."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from eval.csv_table import COLUMNS, LETTERS
from eval.subjects import load_official_subjects
from layerplan.aside import writing_aside
from layerplan.errors import EvaluationError, first_line

REPOSITORIES = {"ceval": "ceval/ceval-exam", "cmmlu": "haonan-li/cmmlu"}


def fetch_benchmark(name: str, *, splits: Sequence[str], repository: str | None = None) -> Path:
    """Returns a folder with the wanted splits, downloading each subject once.

    The folder is `$LAYERPLAN_CACHE/benchmarks/<name>`, by default below `~/.cache/layerplan`; what is there is not
    fetched again, so a machine without a network reads what was cached before.

    Args:
        name: `ceval` or `cmmlu`.
        splits: Split names on the hub.
        repository: Data set id or local data set folder; the authors' own by default.

    Raises:
        EvaluationError: When a subject cannot be fetched and is not cached.
    """
    source = repository or REPOSITORIES[name]
    cache = Path(os.environ.get("LAYERPLAN_CACHE", "~/.cache/layerplan")).expanduser() / "benchmarks" / name
    for split in splits:
        for subject in load_official_subjects(name):
            path = cache / split / f"{subject}.csv"
            if not path.exists():
                _write_rows(path, _fetch_rows(source, subject, split))
    return cache


def _fetch_rows(source: str, subject: str, split: str) -> list[dict[str, str]]:
    import datasets

    try:
        table = datasets.load_dataset(source, subject, split=split)
    except Exception as error:
        first = first_line(error)
        raise EvaluationError(
            f"evaluation.benchmarks: {source}, subject {subject}, split {split} cannot be fetched from the hub ({first})"
        ) from None
    names = {column.lower(): column for column in table.column_names}
    missing = [column for column in ("question", "answer") if column not in names]
    missing += [letter for letter in LETTERS if letter not in table.column_names]
    if missing:
        raise EvaluationError(f"{source}: subject {subject}, split {split} has no column {', '.join(missing)}")
    return [
        {"id": str(index), "question": row[names["question"]], "answer": row[names["answer"]]}
        | {letter: row[letter] for letter in LETTERS}
        for index, row in enumerate(table)
    ]


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with writing_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
