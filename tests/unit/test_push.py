"""A finished run on the hub: by the real client, in a process of its own, against a stand-in of the hub's upload API."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerplan.cli import main
from layerplan.train.request import TrainResult
from tests.hub_uploads import taking_uploads
from tests.qwen3 import build_tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_of_the_test"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as training, export and scoring leave it."""
    folder = tmp_path / "mine"
    export = folder / "hf" / "step_00000007"
    build_tiny_qwen3().save_pretrained(export)
    (export / "README.md").write_text("---\nlibrary_name: transformers\n---\n# a card\n", encoding="utf-8")
    (export / "freeze_plan.json").write_text("{}", encoding="utf-8")
    numbers = dict.fromkeys(("first_loss", "final_loss", "train_s", "wall_s", "tokens_per_s", "mfu"), 1.0)
    counts = dict.fromkeys(("tokens_seen", "skipped_steps", "rollbacks"), 0)
    result = TrainResult(
        **numbers,
        **counts,
        final_step=7,
        final_checkpoint=folder / "checkpoints" / "step_00000007",
        validation_loss=None,
        proof={},
        stopped_early=False,
        hf_dir=export,
    )
    result.save(folder)
    (folder / "verdicts.json").write_text("[]", encoding="utf-8")
    for label in ("base", "step_00000007", "step_00000003"):
        (folder / "evaluation" / label).mkdir(parents=True)
        (folder / "evaluation" / label / "ceval.json").write_text("{}", encoding="utf-8")
    return folder


def push(run: Path, endpoint: str, token: str, *more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "layerplan.cli", "push", str(run), "me/mine", *more]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_is_uploaded_in_one_commit_byte_for_byte(run: Path) -> None:
    with taking_uploads(TOKEN) as (endpoint, taken):
        done = push(run, endpoint, TOKEN)
    assert done.returncode == 0, done.stderr
    assert f"pushed    {endpoint}/me/mine/commit/" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert taken.commits == ["mine, by layerplan"]
    assert taken.cards == [(run / "hf" / "step_00000007" / "README.md").read_text(encoding="utf-8")]
    assert taken.repositories["me/mine"]["visibility"] == "private"
    export = run / "hf" / "step_00000007"
    expected = {path.name: path.read_bytes() for path in export.iterdir()}
    expected |= {f"layerplan/{name}": (run / name).read_bytes() for name in ("training.json", "verdicts.json")}
    expected |= {f"layerplan/evaluation/{label}/ceval.json": b"{}" for label in ("base", "step_00000007")}
    assert taken.files == expected and len(taken.files["model.safetensors"]) > 10_000


def test_a_refused_token_is_one_line_without_the_token(run: Path) -> None:
    with taking_uploads(TOKEN) as (endpoint, taken):
        done = push(run, endpoint, "hf_wrong")
    assert done.returncode == 1 and not taken.files
    assert len(done.stderr.splitlines()) == 1 and "me/mine: the hub did not take it (" in done.stderr
    assert "hf_wrong" not in done.stdout + done.stderr


def test_what_would_be_pushed_is_listed_and_an_unfinished_run_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "me/mine", "--dry-run"]) == 0
    assert "layerplan/evaluation/base/ceval.json" in capsys.readouterr().out
    (run / "training.json").unlink()
    assert main(["push", str(run), "me/mine", "--dry-run"]) == 1
    assert "has no training.json; only a finished run has a model to push" in capsys.readouterr().err
