"""Benchmarks from the Hugging Face hub, kept as the CSV folders everything else reads.

C-Eval lies there as tables, which `datasets` reads. CMMLU is an archive of its authors' CSV files and a script that read it,
which `datasets` has not run since version 4, so the archive itself is fetched.
"""

from __future__ import annotations

import csv
import logging
import os
import zipfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from eval.csv_table import COLUMNS, LETTERS
from eval.subjects import load_official_subjects
from layerplan.aside import writing_aside
from layerplan.errors import EvaluationError, first_line
from layerplan.progress import ProgressLines

logger = logging.getLogger(__name__)

REPOSITORIES = {"ceval": "ceval/ceval-exam", "cmmlu": "haonan-li/cmmlu"}
TABLES = (".parquet", ".csv", ".jsonl", ".arrow")


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
    files = [(split, subject) for split in splits for subject in load_official_subjects(name)]
    missing = [(*each, path) for each in files if not (path := cache / each[0] / f"{each[1]}.csv").exists()]
    archive = _fetch_archive(source) if missing else None
    progress = ProgressLines(f"files of {name}", len(files), logger.info, done=len(files) - len(missing))
    with closing(progress):
        for split, subject, path in missing:
            if archive is None:
                _write_rows(path, _fetch_rows(source, subject, split))
            else:
                _copy_member(archive, split, subject, path)
            progress.add(1)
    return cache


def _fetch_archive(source: str) -> Path | None:
    """The archive of a data set that is nothing else, or that a script would have read; None where `datasets` can read it."""
    from huggingface_hub import HfApi, hf_hub_download

    if Path(source).is_dir() or source.count("/") != 1:
        return None
    try:
        files = HfApi().list_repo_files(source, repo_type="dataset")
        archives = [file for file in files if file.endswith(".zip")]
        is_scripted = f"{source.rpartition('/')[2]}.py" in files
        if len(archives) != 1 or (not is_scripted and any(file.endswith(TABLES) for file in files)):
            return None
        return Path(hf_hub_download(source, archives[0], repo_type="dataset"))
    except Exception as error:
        raise EvaluationError(
            f"evaluation.benchmarks: {source} cannot be fetched from the hub ({first_line(error)})"
        ) from None


def _copy_member(archive: Path, split: str, subject: str, path: Path) -> None:
    """Writes the authors' own file of a subject, under either name that authors give it."""
    with zipfile.ZipFile(archive) as opened:
        names = (f"{split}/{subject}.csv", f"{split}/{subject}_{split}.csv")
        found = next((name for name in names if name in opened.namelist()), None)
        if found is None:
            raise EvaluationError(f"{archive.name}: holds no {names[0]}; subject {subject} has no split {split} there")
        with writing_aside(path) as aside:
            aside.write_bytes(opened.read(found))


def _fetch_rows(source: str, subject: str, split: str) -> list[dict[str, str]]:
    import datasets

    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # of a second each, a hundred times
    try:
        table = datasets.load_dataset(source, subject, split=split)
    except Exception as error:
        first = first_line(error)
        raise EvaluationError(
            f"evaluation.benchmarks: {source}, subject {subject}, split {split} cannot be fetched from the hub ({first})"
        ) from None
    finally:
        if shows_bars:
            datasets.enable_progress_bars()
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
