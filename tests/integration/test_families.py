"""A fixed third of all families through load, lens, loss, cost, plans and export, as the page of all of them says.

`python benchmarks/families.py` asks the other two thirds and writes the page.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers

from tests.families import list_model_types
from tests.family_checks import check_family
from tests.family_table import PAGE, normalise, render_page

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def read_page() -> str:
    return (ROOT / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("model_type", list_model_types()[::3])
def test_a_family_is_exact_or_refused_as_the_page_says(model_type: str, tmp_path: Path):
    report = check_family(model_type, tmp_path)
    assert not [answer for answer in report.answers if answer.startswith("WRONG")], report
    if f"`transformers` {transformers.__version__}," in read_page():
        expected = render_page([report]).splitlines()
        lines = [line for line in expected if line.startswith((f"| {model_type} |", f"- **{model_type}**"))]
        page = normalise(read_page())
        assert lines and all(normalise(line) in page for line in lines), lines


def test_the_page_has_every_model_type_and_no_silent_fault():
    rows = re.findall(r"^\| ([\w.-]+) \| \w+ \|", read_page(), re.MULTILINE)
    assert rows[1:] == list_model_types() if rows[0] == "model type" else rows == list_model_types()
    assert "WRONG" not in read_page()
