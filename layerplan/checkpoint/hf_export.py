"""A checkpoint to a Hugging Face folder: base model plus what was trained, checked before anyone relies on it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerplan.checkpoint.dcp import load_trained_tensors
from layerplan.checkpoint.index import prove_checkpoint
from layerplan.checkpoint.layout import STATE_NAME, read_train_state
from layerplan.checkpoint.model_card import render_model_card
from layerplan.errors import CheckpointError
from layerplan.models.causal_lm import load_causal_lm
from layerplan.models.files import find_model_file, hash_weight_files
from layerplan.models.freezing import apply_plan, compute_tensor_hashes
from layerplan.plan.freeze_plan import PLAN_NAME, FreezePlan

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)


@dataclass(frozen=True)
class ExportReport:
    """What the export proved; that reloaded logits are the trained model's goes without a number."""

    folder: Path
    num_frozen: int
    """Tensors the plan freezes; after reloading, each has the base's bytes."""
    num_trained: int
    """Tensors the plan trains; after reloading, each has the checkpoint's bytes."""
    num_trained_changed: int
    """Trained tensors that differ from the base."""

    def save(self, path: Path) -> None:
        """Writes the proof as JSON, atomically."""
        values = {
            "frozen_tensors_identical_to_base": self.num_frozen,
            "trained_tensors": self.num_trained,
            "trained_tensors_changed": self.num_trained_changed,
        }
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def export_hf(
    *,
    base: str,
    checkpoint: Path,
    out_dir: Path,
    plan: FreezePlan,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> ExportReport:
    """Writes the trained model as safetensors and proves that the frozen tensors are the base's, byte for byte.

    Beside the weights lie the tokenizer, the generation config, `freeze_plan.json` and a model card.

    Raises:
        CheckpointError: When the base is no longer the one the plan was made for, a frozen tensor differs from the base
            after reloading, a trained one did not arrive, or the reloaded model computes other logits.
    """
    _check_base(base, plan)
    model = load_causal_lm(base, revision=revision, trust_remote_code=trust_remote_code)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    applied = apply_plan(model, plan)
    parameters = dict(model.named_parameters())
    frozen_before = compute_tensor_hashes({name: parameters[name] for name in applied.frozen})
    if warning := prove_checkpoint(checkpoint, plan.sealed().sha256):
        print(f"[checkpoint] warning: {warning}", flush=True)
    trained = load_trained_tensors(checkpoint, {name: parameters[name] for name in applied.trainable})
    changed = 0
    with torch.no_grad():
        for name, value in trained.items():
            changed += not torch.equal(parameters[name], value.to(dtypes[name]))
            parameters[name].copy_(value)
    expected = compute_tensor_hashes({name: parameters[name] for name in applied.trainable})
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    _copy_tokenizer(base, revision, partial)
    plan.save(partial / PLAN_NAME)
    plan = plan.sealed()
    reloaded = check_export(partial, frozen=frozen_before, trained=expected)
    check_logits(partial, model, reloaded)
    state = _read_state(checkpoint)
    card = render_model_card(
        plan,
        step=state.get("step", 0),
        state=state,
        num_frozen=len(applied.frozen),
        num_trained=len(applied.trainable),
        num_changed=changed,
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(out_dir, ignore_errors=True)
    partial.replace(out_dir)
    return ExportReport(out_dir, len(applied.frozen), len(applied.trainable), changed)


def check_export(folder: Path, *, frozen: dict[str, str], trained: dict[str, str]) -> nn.Module:
    """Reloads the folder and compares tensor hashes; returns the reloaded model.

    Raises:
        CheckpointError: Naming the first tensor that differs and which side of the plan it is on.
    """
    reloaded = load_causal_lm(str(folder))
    found = compute_tensor_hashes(dict(reloaded.named_parameters()))
    for side, wanted in (("frozen", frozen), ("trained", trained)):
        wrong = sorted(name for name, value in wanted.items() if found.get(name) != value)
        if wrong:
            raise CheckpointError(
                f"{folder}: after export {len(wrong)} {side} tensors are not what was expected; the first is {wrong[0]}"
            )
    return reloaded


@torch.no_grad()
def check_logits(folder: Path, model: nn.Module, reloaded: nn.Module) -> None:
    """Compares both models on one fixed row: equal weights under another config would compute something else.

    Raises:
        CheckpointError: With the largest difference.
    """
    positions = int(getattr(model.config, "max_position_embeddings", None) or 32)
    size = min(32, positions)
    ids = (torch.arange(size) * 7919 % int(model.config.vocab_size))[None]
    wanted, found = (each.eval()(input_ids=ids).logits.float() for each in (model, reloaded))
    difference = float((wanted - found).abs().max())
    if not difference <= 1e-3 * max(1.0, float(wanted.abs().max())):
        raise CheckpointError(
            f"{folder}: after reloading, logits differ by up to {difference:.3g} from those of the trained model;"
            " its config.json does not describe it"
        )


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return read_train_state(checkpoint) if (checkpoint / STATE_NAME).exists() else {}


def _check_base(base: str, plan: FreezePlan) -> None:
    folder = Path(base).expanduser()
    if folder.is_dir() and plan.model.weights_sha256 is not None:
        found = hash_weight_files(folder)
        if found != plan.model.weights_sha256:
            raise CheckpointError(
                f"{folder}: its weights changed since the freeze plan was made (sha256 {found[:12]}, the plan says"
                f" {plan.model.weights_sha256[:12]}); restore them to export this run"
            )


def _copy_tokenizer(base: str, revision: str, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        source = Path(base).expanduser() / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
        elif not Path(base).expanduser().is_dir() and name == "tokenizer.json":
            shutil.copyfile(find_model_file(base, name, revision=revision), folder / name)
