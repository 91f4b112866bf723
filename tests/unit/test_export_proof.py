"""The export proves which tensors moved; every way it could be wrong is caused here on purpose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn

from layerplan.checkpoint.dcp import save_checkpoint
from layerplan.checkpoint.hf_export import check_export, export_hf
from layerplan.config.plan import FreezeDeepPlanConfig
from layerplan.config.train import OptimizerConfig
from layerplan.errors import CheckpointError
from layerplan.models.causal_lm import load_causal_lm
from layerplan.models.files import identify_model
from layerplan.models.freezing import apply_plan, compute_tensor_hashes
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.train.optim import build_optimizer
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3

FROZEN, TRAINED = "model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"


@dataclass
class Run:
    base: Path
    checkpoint: Path
    plan: FreezePlan
    model: nn.Module

    def export(self, out: Path) -> object:
        return export_hf(base=str(self.base), checkpoint=self.checkpoint, out_dir=out, plan=self.plan)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A base, one optimizer step under a plan that trains layer 0 alone, and its checkpoint."""
    base = tmp_path / "base"
    build_tiny_qwen3().save_pretrained(base)
    Tokenizer(models.BPE()).save(str(base / "tokenizer.json"))
    shape = ModelShape.from_hf_config(TINY_QWEN3)
    plan = make_plan(FreezeDeepPlanConfig(boundary=1), model=identify_model(str(base)), shape=shape)
    model = load_causal_lm(str(base))
    apply_plan(model, plan)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1), masters={}, compiled=False)
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step(grad_scale=torch.ones(()))
    save_checkpoint(tmp_path / "checkpoint", model, optimizer, None)
    return Run(base, tmp_path / "checkpoint", plan, model)


def tamper(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name].view(torch.uint8)[0, 0] ^= 1  # one bit
    save_file(tensors, file, metadata={"format": "pt"})


def test_frozen_tensors_are_the_bases_and_trained_ones_the_checkpoints(run: Run, tmp_path: Path) -> None:
    report = run.export(tmp_path / "out")
    base, out = load_file(run.base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    trained = dict(run.model.named_parameters())
    for name in base:
        if name.startswith("model.layers.0."):
            assert torch.equal(out[name], trained[name]) and not torch.equal(out[name], base[name])
        else:
            assert out[name].numpy().tobytes() == base[name].numpy().tobytes()
    assert (report.num_frozen, report.num_trained, report.num_trained_changed) == (len(base) - 11, 11, 11)


@pytest.mark.parametrize(("name", "side"), [(FROZEN, "frozen"), (TRAINED, "trained")])
def test_one_flipped_bit_in_the_export_is_found(run: Run, tmp_path: Path, name: str, side: str) -> None:
    run.export(tmp_path / "out")
    parameters = dict(load_causal_lm(str(tmp_path / "out")).named_parameters())
    hashes = {
        "frozen": compute_tensor_hashes({k: v for k, v in parameters.items() if ".layers.0." not in k}),
        "trained": compute_tensor_hashes({k: v for k, v in parameters.items() if ".layers.0." in k}),
    }
    check_export(tmp_path / "out", **hashes)
    tamper(tmp_path / "out" / "model.safetensors", name)
    with pytest.raises(CheckpointError, match=f"1 {side} tensors are not what was expected; the first is {name}"):
        check_export(tmp_path / "out", **hashes)


def test_a_model_that_writes_another_frozen_tensor_fails_the_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A faulty `save_pretrained` is what the proof is for: it must leave nothing behind."""
    save = type(run.model).save_pretrained

    def faulty(self: nn.Module, folder: Path, **options: object) -> None:
        save(self, folder, **options)
        tamper(Path(folder) / "model.safetensors", FROZEN)

    monkeypatch.setattr(type(run.model), "save_pretrained", faulty)
    with pytest.raises(CheckpointError, match="1 frozen tensors are not what was expected"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_computes_something_else_fails_the_export(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes of all tensors are right, and the model is still another one."""
    save = type(run.model).save_pretrained

    def faulty(self: nn.Module, folder: Path, **options: object) -> None:
        save(self, folder, **options)
        file = Path(folder) / "config.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"rms_norm_eps": 0.5}))

    monkeypatch.setattr(type(run.model), "save_pretrained", faulty)
    with pytest.raises(CheckpointError, match="logits differ by up to"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_export_carries_its_plan_and_a_card_the_hub_can_read(run: Run, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    run.export(tmp_path / "out")
    assert FreezePlan.load(tmp_path / "out" / "freeze_plan.json").trainable_layers == (0,)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and "Base: `base`" in card.text
    assert card.data.library_name == "transformers"
    assert "layer-freezing" in card.data.tags
    assert "frozen tensors, identical to the base byte for byte | 24 |" in card.text
    assert FreezePlan.load(tmp_path / "out" / "freeze_plan.json").sha256 in card.text


def test_a_base_that_changed_since_the_plan_is_refused(run: Run, tmp_path: Path) -> None:
    tamper(run.base / "model.safetensors", FROZEN)
    with pytest.raises(CheckpointError, match="its weights changed since the freeze plan was made"):
        run.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_plan_is_refused(run: Run, tmp_path: Path) -> None:
    shape = ModelShape.from_hf_config(TINY_QWEN3)
    other = make_plan(FreezeDeepPlanConfig(boundary=2), model=run.plan.model, shape=shape)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        export_hf(base=str(run.base), checkpoint=run.checkpoint, out_dir=tmp_path / "out", plan=other)
