"""What an export must show before anyone relies on it: the base's bytes, the checkpoint's values, the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.checkpoint.export_weights import BaseWeights
from layerplan.errors import CheckpointError
from layerplan.models.freezing import compute_tensor_hashes
from layerplan.models.positions import positions_of
from layerplan.models.ref import ModelRef
from layerplan.models.weight_files import have_equal_bytes, read_stored_tensors

LOGIT_BOUND = 1e-3
"""Largest difference of a logit that two computations of the same float32 weights may show, relative to the largest."""


def check_export(export: ModelRef, weights: BaseWeights, model: nn.Module) -> None:
    """Compares the files with the base's, byte for byte, and the model they make with the one in memory.

    The model in memory has its trained parameters rounded to the dtype they are exported in, so the comparison is of
    equal weights: it needs no allowance for rounding, and shows a config or code that describes another model.

    Args:
        export: The folder it lies in, and the consent to the base's code.
        weights: The base's tensors.
        model: The trained model, float32.

    Raises:
        CheckpointError: Naming the first tensor that differs and which side of the plan it is on, or the largest
            difference of a logit.
    """
    folder = Path(export.name)
    _check_frozen_bytes(folder, weights)
    reloaded = export.load()
    _check_values(folder, weights, model, reloaded)
    wanted, found = compute_logits(model), compute_logits(reloaded)
    difference = float((wanted - found).abs().max())
    if not difference <= LOGIT_BOUND * max(1.0, float(wanted.abs().max())):
        raise CheckpointError(
            f"{folder}: after reloading, logits differ by up to {difference:.3g} from those of the trained model;"
            " its config.json does not describe it"
        )


@torch.no_grad()
def compute_logits(model: Any) -> Tensor:
    """Logits (1, at most 32 tokens, vocabulary) of one fixed row; a model that hashes at random does so alike each time."""
    config = model.config.get_text_config()
    ids = (torch.arange(min(32, positions_of(config) or 32)) * 7919 % int(config.vocab_size))[None]
    model.config.use_cache = config.use_cache = False  # some hybrids cannot start one without attention layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits.float()


def measure_rounding(exact: Tensor, rounded: Tensor) -> float:
    """Largest difference of a logit that rounding to the exported dtype made, relative to the largest logit."""
    return float((exact - rounded).abs().max() / exact.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _check_frozen_bytes(folder: Path, weights: BaseWeights) -> None:
    found = read_stored_tensors(folder)
    _refuse(
        folder,
        "frozen",
        [
            name
            for name in weights.frozen
            if name not in found or not have_equal_bytes(found[name], weights.stored[name])
        ],
    )


def _check_values(folder: Path, weights: BaseWeights, model: nn.Module, reloaded: nn.Module) -> None:
    """Every parameter of the reloaded model is that of the model in memory, bit for bit."""
    wanted, found = (compute_tensor_hashes(dict(each.named_parameters())) for each in (model, reloaded))
    wrong = [name for name, value in wanted.items() if found.get(name) != value]
    for side in ("frozen", "trained"):
        _refuse(folder, side, [name for name in wrong if (name in weights.dtypes) == (side == "trained")])


def _refuse(folder: Path, side: str, wrong: list[str]) -> None:
    if wrong:
        raise CheckpointError(
            f"{folder}: after export {len(wrong)} {side} tensors are not what was expected; the first is {min(wrong)}"
        )
