"""A base by its hub id: a run goes on with the commit that it began with, wherever its branch stands by then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.hub_server import COMMIT, HubRepository, read_files, serving
from tests.model_folders import edit_weights

NEXT = "b" * 40


@pytest.fixture
def repository(four_layers: str, tmp_path: Path) -> HubRepository:
    """Two commits of a base: in the second its weights are others, and nothing else."""
    first, second = read_files(Path(four_layers)), tmp_path / "second"
    second.mkdir()
    for name, content in first.items():
        (second / name).write_bytes(content)
    edit_weights(second, lambda tensors: tensors.update({name: 2 * value for name, value in tensors.items()}))
    return HubRepository("models", "owner/base", {COMMIT: first, NEXT: read_files(second)})


def test_a_run_keeps_its_commit(
    repository: HubRepository,
    four_layers: str,
    write_pretrained_config: Callable[[str], Path],
    run_job: Callable[..., Any],
    shared_cluster: dict[str, str],
    tmp_path: Path,
) -> None:
    config = write_pretrained_config("owner/base")
    steps = yaml.safe_load(config.read_text())["train"]["max_steps"]
    run = tmp_path / "runs" / "hub"
    choices = ("--set", f"storage_path={run.parent}", "--set", f"name={run.name}")
    with serving(repository):
        env = shared_cluster | {"HF_ENDPOINT": repository.endpoint, "HF_HUB_OFFLINE": "0"}
        env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        first = run_job("jobs/cpt.py", "--config", config, *choices, env=env)
        assert first.returncode == 0, first.output[-3000:]
        repository.branches["main"] = NEXT
        repository.requests.clear()
        more = run_job("jobs/cpt.py", "--config", config, *choices, "--set", f"train.max_steps={steps + 1}", env=env)
        assert more.returncode == 0, more.output[-3000:]

    assert "HTTP Request" not in first.output + more.output
    assert f"main of owner/base is at {NEXT[:12]} now; this run goes on with {COMMIT[:12]}" in more.output
    assert not any(NEXT in request or "model.safetensors" in request for request in repository.requests)
    noted = json.loads((run / "base_files.json").read_text())
    plan = json.loads((run / "freeze_plan.json").read_text())
    assert noted["commit"] == plan["model"]["revision"] == COMMIT
    assert noted["weights"] == plan["model"]["weights_sha256"]
    scores = json.loads((run / "evaluation" / "base" / "ceval.json").read_text())
    assert COMMIT in json.dumps(scores)
    card = (run / "hf" / f"step_{steps + 1:08}" / "README.md").read_text()
    assert 'base_model: "owner/base"' in card and COMMIT in card
    exported = load_file(run / "hf" / f"step_{steps + 1:08}" / "model.safetensors")
    base = load_file(Path(four_layers) / "model.safetensors")
    kept = {name for name, value in exported.items() if torch.equal(value, base[name])}
    assert {"model.layers.1.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"} & kept
