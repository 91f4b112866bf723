"""What `layerplan compare` prints: each row names both that it compares, and what is missing is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from layerplan.errors import EvaluationError
from layerplan.pipeline.compare import compare
from tests.scored_runs import leave_scored_run


def read_rows(shown: str) -> list[list[str]]:
    """Cells of the table's rows; lines of one row are joined by a blank."""
    rows: list[list[str]] = []
    for line in shown.splitlines():
        if not line.startswith("│"):
            continue
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [" ".join(pair).strip() for pair in zip(rows[-1], cells, strict=True)]
    return rows


def test_each_row_names_both_that_it_compares(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """16 questions: 4, 5 and 3 right are 25.0, 31.2 and 18.8 %; a value stands under the name it belongs to."""
    first = leave_scored_run(tmp_path / "first", right=5, bits={"notes": 1.1})
    second = leave_scored_run(tmp_path / "second", right=3, bits={"notes": 0.9})
    compare([str(first), str(second)])
    rows = [[re.sub(r" \[.*", "", cell) for cell in row] for row in read_rows(capsys.readouterr().out)]
    assert [row[2:5] for row in rows] == [
        ["the base 25.0", "first 31.2", "+6.2"],
        ["the base 25.0", "second 18.8", "-6.2"],
        ["first 31.2", "second 18.8", "-12.5"],
    ]


def test_one_run_against_its_base_keeps_the_short_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    compare([str(leave_scored_run(tmp_path / "run", right=5, bits={}))])
    shown = capsys.readouterr().out
    assert "base" in shown and "trained" in shown and "compared with" not in shown and "p values" not in shown
    assert [row[2:5] for row in read_rows(shown)] == [["25.0 [10.2, 49.5]", "31.2 [14.2, 55.6]", "+6.2 [-7.1, +19.6]"]]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [leave_scored_run(tmp_path / where / "run", right=right, bits={}) for where, right in (("a", 5), ("b", 3))]
    compare([str(run) for run in runs], table=str(tmp_path / "table.md"))
    assert "b/run is not distinguishable from a/run" in " ".join(capsys.readouterr().out.split())
    assert re.findall(r"^\| (\w+/run) ", (tmp_path / "table.md").read_text(), re.MULTILINE) == ["a/run", "b/run"]


def test_a_run_is_not_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = leave_scored_run(tmp_path / "run", right=5, bits={})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match=r"run: is named twice"):
        compare([str(run), "run"])


def test_texts_stand_in_the_order_of_the_config_with_both_ends_of_the_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Every document differs by the same, so the interval is the difference."""
    run = leave_scored_run(tmp_path / "run", right=5, bits={"target": 0.9, "general": 1.1})
    compare([str(run)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run against its base")]
    assert lines[0].startswith(
        "run against its base, target: better than the base: 0.9095 against 1.0095 bits per byte"
    )
    assert "(-0.1000 [95 %: -0.1000, -0.1000], p = 3.81e-06, 20 documents)" in lines[0]
    assert lines[1].startswith("run against its base, general: worse than the base")


def test_what_is_not_scored_yet_is_said_with_what_it_does_to_p(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The least p of 20 documents that differ alike is 2 / 2^20, times one text while the other run is scored, then times three.

    Those are each run with its base, and one run with the other.
    """
    whole = leave_scored_run(tmp_path / "whole", right=5, bits={"notes": 0.9})
    scoring = leave_scored_run(tmp_path / "scoring", right=3, bits={}, asked=["notes"])
    compare([str(whole), str(scoring)])
    early = capsys.readouterr().out
    assert (
        "not scored yet: scoring on the text notes; p values are corrected over what is there and can only grow"
        in early
    )
    assert "p = 1.91e-06, 20 documents" in early and "scoring against its base" not in early
    leave_scored_run(scoring, right=3, bits={"notes": 1.1})
    compare([str(whole), str(scoring)])
    late = capsys.readouterr().out
    assert "not scored yet" not in late and late.count("p = 5.72e-06, 20 documents") == 3
    assert "corrected over these 3 comparisons" in late


def test_a_benchmark_that_the_base_was_not_asked_yet_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = leave_scored_run(tmp_path / "run", right=5, bits={})
    config = json.loads((run / "resolved_config.json").read_text())
    config["evaluation"]["protocols"].append("generate")
    (run / "resolved_config.json").write_text(json.dumps(config))
    compare([str(run)])
    shown = capsys.readouterr().out
    assert (
        "not scored yet: run's base on ceval/generate; " in shown and "not scored yet: run on ceval/generate; " in shown
    )


def test_a_run_that_leaves_its_base_unscored_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = leave_scored_run(tmp_path / "first", right=5, bits={"notes": 0.9})
    second = leave_scored_run(tmp_path / "second", right=3, bits={"notes": 0.9})
    shutil.rmtree(second / "evaluation" / "base")
    config = json.loads((second / "resolved_config.json").read_text())
    config["evaluation"]["evaluate_base"] = False
    (second / "resolved_config.json").write_text(json.dumps(config))
    compare([str(first), str(second)])
    shown = capsys.readouterr().out
    assert "second against its base" not in shown and "not scored yet" not in shown
    assert "not compared: second with a base of its own, which evaluation.evaluate_base=false leaves unscored" in shown


def test_a_name_that_stands_for_two_texts_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [
        leave_scored_run(tmp_path / "one", right=5, bits={"notes": 0.9, "same": 1.0}),
        leave_scored_run(tmp_path / "two", right=5, bits={"notes": 0.9, "same": 1.0}, of_other_documents=["notes"]),
    ]
    compare([str(run) for run in runs])
    shown = capsys.readouterr().out
    assert "notes: one and two were scored on different documents under this name" in shown
    assert "same: one and two" not in shown
    assert "two against one, same: not distinguishable from one: " in shown and "two against one, notes" not in shown


def edit_scores(run: Path, label: str, **origin: object) -> None:
    """Says of a model's scores where they come from."""
    folder = run / "evaluation" / label
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        for result in values.values():
            result["origin"] = {"model": "m", "backend": "transformers", **origin}
        path.write_text(json.dumps(values))
    for path in (folder / "held_out").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | origin))


def edit_evaluation(run: Path, **values: object) -> None:
    path = run / "resolved_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"evaluation": config["evaluation"] | values}))


@pytest.mark.parametrize(
    ("first", "second", "num_gpus", "told"),
    [
        ("float32", "float32", 0, None),
        ("float32", "bfloat16", 0, "in float32: one's base, one, two's base; in bfloat16: two"),
        ("float32", "auto", 0, None),
        ("float32", "auto", 1, "in float32: one's base, one, two's base; in bfloat16: two"),
    ],
)
def test_scores_of_several_precisions_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture, first: str, second: str, num_gpus: int, told: str | None
) -> None:
    """`auto`, which earlier versions recorded, is what the run's own engines make of it."""
    one, two = (leave_scored_run(tmp_path / name, right=5, bits={"notes": 0.9}) for name in ("one", "two"))
    for run, trained in ((one, first), (two, second)):
        edit_scores(run, "base", dtype="float32")
        edit_scores(run, "step_00000010", dtype=trained)
    edit_evaluation(two, num_gpus_per_actor=num_gpus)
    compare([str(one), str(two)])
    found = [line for line in capsys.readouterr().out.splitlines() if "several precisions" in line]
    warned = f"scored in several precisions, which differences between them may come from: {told}"
    assert found == ([] if told is None else [warned])


@pytest.mark.parametrize(("other", "is_told"), [("b", True), ("a", False), (None, False)])
def test_bases_of_other_configs_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture, other: str | None, is_told: bool
) -> None:
    """Scores of versions that did not look at the config say nothing of it."""
    one, two = (leave_scored_run(tmp_path / name, right=5, bits={}) for name in ("one", "two"))
    for run, config in ((one, "a"), (two, other)):
        edit_scores(run, "base", dtype="float32", config_sha256=config)
        edit_scores(run, "step_00000010", dtype="float32", config_sha256="of an export")
    compare([str(one), str(two)])
    shown = capsys.readouterr().out
    warned = "the bases have equal weights and unequal configs, which differences may come from: one; two"
    assert (warned in shown) is is_told and ("unequal configs" in shown) is is_told


def test_runs_are_compared_with_each_other_on_texts_they_share(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """0.9 and 1.1 bits are 0.2 apart on every one of 20 documents: 2 / 2^20, times three comparisons."""
    first = leave_scored_run(tmp_path / "first", right=5, bits={"notes": 0.9})
    second = leave_scored_run(tmp_path / "second", right=3, bits={"notes": 1.1})
    compare([str(first), str(second)], out=str(tmp_path / "out.json"))
    line = "worse than first: 1.1095 against 0.9095 bits per byte (+0.2000 [95 %: +0.2000, +0.2000], p = 5.72e-06, 20 documents)"
    assert f"second against first, notes: {line}" in capsys.readouterr().out.splitlines()
    written = json.loads((tmp_path / "out.json").read_text())
    texts = [item for item in written if "text" in item]
    assert [item["benchmark"] for item in written[:3]] == ["ceval"] * 3 and texts == written[3:]
    assert [(item["run"], item["reference"]) for item in texts] == [
        ("first", "its base"),
        ("second", "its base"),
        ("second", "first"),
    ]
    assert texts[2]["sentence"] == line and texts[2]["adjusted_p"] == pytest.approx(6 / 2**20)
    assert texts[2]["bits_per_byte"] - texts[2]["reference_bits_per_byte"] == pytest.approx(0.2)


def test_seeds_are_one_arm_on_texts_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = []
    for name, rate, bits in (("a1", 1e-3, 0.9), ("a2", 1e-3, 0.95), ("b1", 1e-4, 1.1), ("b2", 1e-4, 1.15)):
        run = leave_scored_run(tmp_path / name, right=5, bits={"notes": bits})
        config = json.loads((run / "resolved_config.json").read_text())
        config |= {"name": name, "seed": int(name[1]), "rate": rate}
        (run / "resolved_config.json").write_text(json.dumps(config))
        runs.append(str(run))
    compare(runs, pool_seeds=True, out=str(tmp_path / "out.json"))
    assert "b1 against a1, notes: not distinguishable from a1: 1.1345 against 0.9345" in capsys.readouterr().out
    texts = [item for item in json.loads((tmp_path / "out.json").read_text()) if "text" in item]
    assert [(item["run"], item["num_seeds"], item["num_reference_seeds"]) for item in texts[4:]] == [("b1", 2, 2)]


def test_a_text_that_the_config_asks_for_no_more_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = leave_scored_run(tmp_path / "run", right=5, bits={"old": 0.9, "notes": 0.9}, asked=["notes"])
    compare([str(run)])
    shown = capsys.readouterr().out
    assert "run against its base, notes" in shown and "old" not in shown


def test_a_sweep_is_refused_as_one_with_what_to_run_instead(tmp_path: Path) -> None:
    run = leave_scored_run(tmp_path / "run", right=5, bits={})
    trial = tmp_path / "swp" / "sweep" / "boundary_10"
    trial.mkdir(parents=True)
    (trial / "trial.json").write_text("{}")
    shutil.copy(run / "training.json", trial)
    plan = re.escape(f"--set 'plan={{type: file, path: {tmp_path}/swp/sweep/")
    for paths in ([run, tmp_path / "swp"], [tmp_path / "swp", run]):
        with pytest.raises(
            EvaluationError, match=rf"swp: is a sweep, .*report {tmp_path}/swp` .*{plan}TRIAL/freeze_plan"
        ):
            compare([str(path) for path in paths])
    with pytest.raises(
        EvaluationError, match=rf"is a trial of a sweep, .*{tmp_path}/swp` .*{plan}boundary_10/freeze_plan"
    ):
        compare([str(run), str(trial)])
    shutil.copytree(tmp_path / "swp" / "sweep", run / "sweep")
    compare([str(run)])
