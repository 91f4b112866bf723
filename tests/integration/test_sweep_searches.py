"""Searches that choose their trials, on a real cluster: Optuna's sampler, and the order of a measurement taken there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

STEPS = 4
SPACE = {f"boundary_{boundary:02d}{side}" for boundary in (1, 2, 3) for side in ("", "_shallow")}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, corpus_source: dict[str, object], four_layers: str) -> Path:
    """A base of four layers and a space of six trials."""
    folder = tmp_path_factory.mktemp("searches")
    values = {
        "storage_path": str(folder),
        "model": {"type": "pretrained", "name": four_layers},
        "corpus": {"seq_len": 64, "rows_per_group": 2, "validation_rows": 4, "sources": [corpus_source]},
        "train": {"max_steps": STEPS, "global_batch_size": 2, "num_workers": 1, "compute_dtype": "float32"},
        "measure": {"num_rows": 2, "seq_len": 64},
        "sweep": {"boundaries": [1, 2, 3], "freeze": ["deep", "shallow"], "max_steps": STEPS},
    }
    values["train"] |= {"num_cpus_per_worker": 0.5, "optimizer": {"learning_rate": 3e-3}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "sweep.yaml"


def sweep(
    config: Path, run_here: Callable[..., Any], name: str, search: dict[str, Any], *space: str
) -> tuple[dict[str, float], str]:
    """Runs a sweep and returns the losses of the trials that ended, and what was said."""
    settings = [f"name={name}", f"sweep.search={json.dumps(search)}", *space]
    command = ["jobs/sweep_boundary.py", "--config", config]
    job = run_here(*command, *(part for each in settings for part in ("--set", each)))
    assert job.returncode == 0, job.output[-6000:]
    folder = config.parent / name / "sweep"
    results = json.loads((folder / "results.json").read_text())
    assert json.loads((folder / "chosen.json").read_text())["trial"] == results[0]["name"]
    assert all(item["step"] == STEPS for item in results)
    report = (config.parent / name / "report.html").read_text(encoding="utf-8")
    assert "<h2>The sweep</h2>" in report and "svg" in report
    return {item["name"]: item["loss"] for item in results}, job.output


@pytest.mark.long
def test_optuna_suggests_as_many_trials_as_it_may(config: Path, run_here: Callable[..., Any]) -> None:
    auto = "train.micro_batch_size=auto"
    found, said = sweep(config, run_here, "optuna", {"type": "optuna", "num_trials": 3}, auto)
    assert len(found) == 3 and found.keys() < SPACE and "optuna search of 6 trials" in said


@pytest.mark.long
def test_a_profile_guided_search_measures_and_leaves_out_what_cannot_win(
    config: Path, run_here: Callable[..., Any]
) -> None:
    """Without a margin the second seed is for the best trial of the first alone."""
    space = ("sweep.boundaries=[1, 3]", "sweep.freeze=[deep, spread]", "sweep.seeds=[0, 1]")
    found, said = sweep(config, run_here, "guided", {"type": "profile", "by": "block_influence", "margin": 0}, *space)
    assert "measuring the layers of" in said and "block_influence" in said
    assert (config.parent / "guided" / "layer_measurements.json").exists()
    first = {name: loss for name, loss in found.items() if "seed1" not in name}
    best = min(first, key=lambda name: first[name])
    assert {name for name in first if "spread" in name} == {"boundary_01_spread", "boundary_03_spread"}
    assert len(first) == 4 and found.keys() - first.keys() == {f"{best}_seed1"}
