"""Adapters out of a checkpoint: in PEFT's own format, and merged into the matrices of the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerplan.aside import writing_folder_aside
from layerplan.checkpoint.dcp import load_trained_tensors
from layerplan.checkpoint.trained_values import ReadTrained
from layerplan.config.finetune import LoraOptions
from layerplan.models.adapters import (
    compute_delta,
    find_adapted,
    list_adapter_tensors,
    save_adapter,
    wrap_adapters,
)
from layerplan.models.meta import hollow_values
from layerplan.models.ref import ModelRef
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.storage.paths import StoredPath


def export_adapter(
    base: ModelRef, checkpoint: StoredPath, out_dir: Path, plan: FreezePlan, options: LoraOptions
) -> ReadTrained:
    """Writes the adapter's folder, and returns what reads the trained parameters of the merged model.

    Args:
        base: The base.
        checkpoint: Holds the adapters.
        out_dir: Folder of the adapter; appears when it is whole.
        plan: Which layers were adapted.
        options: Rank and scale.

    Raises:
        CheckpointError: When the checkpoint lacks an adapter.
    """
    skeleton = base.skeleton()
    with hollow_values(skeleton.model):  # adapters take device and dtype of what they stand beside
        wrapped: Any = wrap_adapters(skeleton.model, plan.trainable_layers, options)
    tensors = load_trained_tensors(checkpoint, list_adapter_tensors(wrapped))
    for name, value in list_adapter_tensors(wrapped).items():
        value.data.copy_(tensors[name])
    with writing_folder_aside(out_dir) as folder:
        save_adapter(wrapped, folder, base, plan.model)
    adapted = find_adapted(wrapped)

    def read(name: str, shape: Sequence[int]) -> Tensor:
        value = skeleton.reader.read(name, dtype=torch.float32)
        return value if name not in adapted else value + compute_delta(adapted[name])

    return read
