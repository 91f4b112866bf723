"""The subjects of the benchmarks, as their authors list them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

DATA = Path(str(resources.files("eval").joinpath("data")))
"""What comes with the package: the list of subjects, and a small benchmark of our own."""


def is_builtin(subjects: Iterable[str]) -> bool:
    """Whether these are subjects of the package's own questions, which have the format of C-Eval and are not it."""
    own = json.loads((DATA / "builtin" / "subjects.json").read_text(encoding="utf-8"))
    return set(subjects) <= set(own)


def load_official_subjects(name: str) -> dict[str, dict[str, Any]]:
    """The authors' subjects of a benchmark: Chinese name, category, and whether it is specific to China."""
    with (DATA / "subjects.tsv").open(encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle, delimiter="\t") if row["benchmark"] == name]
    return {
        row["subject"]: {
            "name_zh": row["name_zh"],
            "category": row["category"],
            "china_specific": row["china_specific"] == "yes",
        }
        for row in rows
    }
