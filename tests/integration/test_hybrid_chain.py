"""Hybrids and expanded models through the whole chain: put together, traced, planned, trained, exported, scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from layerplan.config.stitch import StitchedModelConfig
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.build import write_stitched
from layerplan.models.stitching.recipe import read_donor, resolve_recipe
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.stitch_report import StitchReport
from tests.hybrids import NEMOTRON
from tests.integration.conftest import TINY

LAYERS = [{"kind": "nemotron", "count": 2}, {"donor": "base", "layers": "1:2"}]


def write_config(
    path: Path, donor: str, source: dict[str, object], model: dict[str, object], **changes: object
) -> Path:
    train = {**TINY["train"], "max_steps": 6, "checkpoint_every_steps": 3, "validate_every_steps": 6}
    config = {
        **TINY,
        "model": {"type": "stitched", "donors": {"base": {"name": donor}}, **model},
        "plan": {"type": "stitched", "train": "new"},
        "train": train,
        "corpus": {**TINY["corpus"], "sources": [source]},
        "storage_path": str(path.parent),
        "name": path.stem,
        **changes,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def find_export(run: Path) -> Path:
    return run / json.loads((run / "training.json").read_text())["hf_dir"]


@pytest.mark.long
def test_a_hybrid_is_made_traced_trained_on_two_workers_exported_and_scored(
    run_here, seed_model, corpus_source, tmp_path
):
    """The Nemotron half trains, goes on from its checkpoint, and leaves the donor's tensors with the donor's bytes."""
    config = write_config(
        tmp_path / "halves.yaml", seed_model, corpus_source, {"layers": LAYERS, "kind_sizes": {"nemotron": NEMOTRON}},
        evaluation={**TINY["evaluation"], "protocols": ["logit", "generate"]},
    )  # fmt: skip
    job = run_here("jobs/cpt.py", "--config", config)
    assert job.returncode == 0, job.output[-4000:]
    more = run_here("jobs/cpt.py", "--config", config, "--set", "train.max_steps=8")
    assert more.returncode == 0, more.output[-4000:]
    run = tmp_path / "halves"
    assert find_export(run).name == "step_00000008"
    plan, export = FreezePlan.load(run / "freeze_plan.json"), find_export(run)
    assert plan.trainable_layers == (0, 1)
    assert json.loads((run / "self_test.json").read_text())["recipe"]["rows"] == "reset"
    base = run / "base_model" / "stitched"
    before, after = load_file(base / "model.safetensors"), load_file(export / "model.safetensors")
    donor, report = load_file(Path(seed_model) / "model.safetensors"), StitchReport.load(base / "stitch.json")
    given = {tensor.name: str(tensor.donor_tensor) for tensor in report.tensors if tensor.donor is not None}
    assert all(after[name].numpy().tobytes() == donor[source].numpy().tobytes() for name, source in given.items())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(before) - set(given)
    assert (run / "report.html").exists() and list((run / "evaluation").glob("step_*/*.json"))
    traced = run_here(
        "jobs/trace_layers.py", "--config", config, "--set", "name=traced", "--set", "plan={type: from_profile}"
    )
    assert traced.returncode == 0, traced.output[-3000:]
    assert json.loads((tmp_path / "traced" / "layer_profile.json").read_text())["model"]["num_layers"] == 3


@pytest.mark.long
def test_an_expanded_model_trains_its_copies_only_and_resumes(run_here, seed_model, corpus_source, tmp_path):
    config = write_config(tmp_path / "expanded.yaml", seed_model, corpus_source, {"expand": {"copies": 2}})
    assert run_here("jobs/cpt.py", "--config", config).returncode == 0
    more = run_here("jobs/cpt.py", "--config", config, "--set", "train.max_steps=8")
    assert more.returncode == 0, more.output[-3000:]
    run = tmp_path / "expanded"
    export = find_export(run)
    assert export.name == "step_00000008"
    assert StitchReport.load(run / "base_model" / "stitched" / "stitch.json").keeps_logits
    before = load_file(run / "base_model" / "stitched" / "model.safetensors")
    after = load_file(export / "model.safetensors")
    moved = {name.split(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"1", "3"}
    assert ModelRef(str(export)).config()["model_type"] == "qwen3"


@pytest.mark.real_model
def test_a_published_model_with_copied_layers_has_its_own_logits_bit_for_bit(smollm2, tmp_path):
    """SmolLM2-135M: 30 layers and 6 copies, on a real sentence."""
    folder = tmp_path / "expanded"
    folder.mkdir()
    spec = StitchedModelConfig(donors={"base": {"name": smollm2}}, expand={"copies": 6})
    report = write_stitched(resolve_recipe(spec, {"base": read_donor(ModelRef(smollm2))}), folder, seed=0)
    donor, expanded = ModelRef(smollm2).load(), ModelRef(str(folder)).load()
    ids = ModelRef(str(folder)).tokenizer()("The capital of France is Paris.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(donor(ids).logits, expanded(ids).logits)
    assert len(report.layers) == 36 and sum(tensor.donor is None for tensor in report.tensors) == 12
