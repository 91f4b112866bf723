"""A checkpoint to a Hugging Face folder: base model plus what was trained, checked before anyone relies on it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from layerplan.artifacts import write_json
from layerplan.aside import writing_folder_aside
from layerplan.checkpoint.dcp import TrainedReader
from layerplan.checkpoint.export_proof import check_export, compute_logits, measure_rounding
from layerplan.checkpoint.export_report import ExportReport
from layerplan.checkpoint.export_weights import sort_base_weights, write_weights
from layerplan.checkpoint.index import prove_checkpoint
from layerplan.checkpoint.layout import read_train_state
from layerplan.checkpoint.model_card import render_model_card
from layerplan.checkpoint.trained_values import ReadTrained, TrainedValues
from layerplan.errors import CheckpointError
from layerplan.models.files import hash_weight_files, list_companions
from layerplan.models.freezing import AppliedPlan, apply_plan
from layerplan.models.ref import ModelRef
from layerplan.models.streaming import run_streamed
from layerplan.models.written_tokenizer import name_plain_class
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.run_folder import CARD_NAME, PLAN_NAME, STATE_NAME
from layerplan.storage.paths import StoredPath

logger = logging.getLogger(__name__)


def export_hf(
    *,
    base: ModelRef,
    checkpoint: StoredPath,
    out_dir: Path,
    plan: FreezePlan,
    export_dtype: Literal["base", "float32"] = "base",
    read_trained: ReadTrained | None = None,
) -> ExportReport:
    """Writes the trained model as safetensors and proves that the frozen tensors are the base's, byte for byte.

    The files are the base's own with the trained tensors replaced; beside them lie all other files of the base (config,
    tokenizer, generation config, code, licence), `freeze_plan.json` and a model card. Where `transformers` would take a
    class that splits text otherwise than `tokenizer.json`, the tokenizer's config names the plain one. Memory holds one
    tensor at a time, and for the comparison of logits one decoder layer beside what is outside of them.

    Args:
        base: The base.
        checkpoint: What was trained.
        out_dir: Folder of the export; appears only when everything was proved.
        plan: What was frozen.
        export_dtype: Dtype of the trained tensors: the one the base keeps each in, or float32.
        read_trained: Reads what trained where the checkpoint does not hold it as it is: adapters come merged.

    Raises:
        CheckpointError: When the base is no longer the one the plan was made for, a frozen tensor has other bytes than
            in the base, a trained one did not arrive, or the reloaded model computes other logits.
    """
    _check_base(base.name, plan)
    skeleton = base.skeleton()
    applied = apply_plan(skeleton.model, plan)
    source = base.folder(with_weights=True)
    weights = sort_base_weights(skeleton.model, source, applied.trainable, as_float32=export_dtype == "float32")
    if warning := prove_checkpoint(checkpoint, plan.sealed().sha256):
        logger.warning(warning)
    trained = TrainedValues(skeleton, weights, read_trained or TrainedReader(checkpoint).read)
    state = _read_state(checkpoint)
    with writing_folder_aside(out_dir) as partial:
        write_weights(weights, skeleton.model, trained.read_rounded, partial)
        copy_companions(source, partial)
        replaced = name_plain_class(partial)
        if export_dtype == "float32" and any(weights.stored[name].dtype != "F32" for name in weights.direct):
            _say_float32(partial)
        plan.save(partial / PLAN_NAME)
        logits = check_export(base.at(partial), weights, skeleton, trained.hashes)
        report = _report(out_dir, applied, trained, logits, export_dtype, replaced)
        card = render_model_card(plan.sealed(), step=state.get("step", 0), state=state, report=report)
        (partial / CARD_NAME).write_text(card, encoding="utf-8")
    return report


def _report(
    out_dir: Path,
    applied: AppliedPlan,
    trained: TrainedValues,
    logits: torch.Tensor,
    export_dtype: str,
    replaced_class: str | None,
) -> ExportReport:
    moved = 0.0
    if trained.is_rounded:
        model = trained.base.model
        exact = run_streamed(model, trained.read_any, lambda: compute_logits(model))
        moved = measure_rounding(exact, logits)
    dtypes = {str(dtype).removeprefix("torch.") for each in trained.weights.dtypes.values() for dtype in each}
    counts = len(applied.frozen), len(applied.trainable), len(trained.changed)
    return ExportReport(out_dir, *counts, tuple(sorted(dtypes)), moved, export_dtype, replaced_class)


def copy_companions(source: Path, folder: Path) -> None:
    """Copies everything of a model folder that is neither weights nor of our own making, byte for byte."""
    for name in list_companions(source):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _say_float32(folder: Path) -> None:
    """Names float32 in the config, or whoever loads the model by it would round again."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values.setdefault("dtype", "float32")
    for each in (values, *(part for part in values.values() if isinstance(part, dict))):
        each.update({key: "float32" for key in ("dtype", "torch_dtype") if key in each})
    write_json(path, values)


def _read_state(checkpoint: StoredPath) -> dict[str, Any]:
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
