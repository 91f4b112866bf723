"""The configs of the paper's pair, dry-run without a network: what they print is what the documentation's table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from layerplan.cli import main

ROOT = Path(__file__).resolve().parents[2]


def read_table() -> list[tuple[str, ...]]:
    """Rows of the table of docs/hybrids.md, with the cells of a config's first row in its second too."""
    rows, above = [], ("", "")
    for line in (ROOT / "docs" / "hybrids.md").read_text(encoding="utf-8").splitlines():
        cells = tuple(cell.strip(" `") for cell in line.strip("|").split("|"))
        if line.startswith("|") and len(cells) == 6 and cells[2] in ("new", "donor"):
            above = (cells[0] or above[0], cells[1] or above[1])
            rows.append((*above, *cells[2:]))
    return rows


TABLE = read_table()


def test_the_table_has_both_halves_of_every_arm():
    arms = sorted(path.stem for path in (ROOT / "jobs" / "configs").glob("*nemotron*.yaml"))
    assert len(arms) == 4 and sorted((row[0], row[2]) for row in TABLE) == [
        (arm, half) for arm in arms for half in ("donor", "new")
    ]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}-{row[2]}")
def test_a_dry_run_prints_what_the_table_says(row, monkeypatch, capsys):
    arm, total, half, trained, cost, memory = row
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert main(["run", "--config", f"jobs/configs/{arm}.yaml", "--set", f"plan.train={half}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "note   corpus.sources.0.path=data/cci3-hq: no such file or folder; a run would stop here" in shown
    assert f"{total} parameters" in shown
    (plan,) = re.findall(r"^this plan +(\S+) M +(\S+) +(\S+) ", shown, re.MULTILINE)
    gflop, share = cost.split(", ")
    assert plan[0] == f"{int(trained.replace(',', '')) / 1e6:.1f}"
    assert (f"{float(plan[1]):.2f}", f"{float(plan[2]):.2f}") == (gflop, share)
    gib, _, recomputed = memory.partition(", ")
    (needed,) = re.findall(r"^memory (\S+) GiB of 139", shown, re.MULTILINE)
    assert f"{float(needed):.0f}" == gib
    assert f", {recomputed or '0 layers recomputed'};" in shown
