"""What an export must show before anyone relies on it: the base's bytes, the checkpoint's values, the same function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerplan.checkpoint.export_weights import BaseWeights
from layerplan.errors import CheckpointError
from layerplan.models.freezing import hash_tensor
from layerplan.models.positions import positions_of
from layerplan.models.ref import ModelRef
from layerplan.models.skeleton import Skeleton
from layerplan.models.streaming import run_streamed
from layerplan.models.weight_files import have_equal_bytes, read_stored_tensors

LOGIT_BOUND = 1e-3
"""Largest difference of a logit that two computations of the same float32 weights may show, relative to the largest."""


def check_export(export: ModelRef, weights: BaseWeights, base: Skeleton, trained: Mapping[str, str]) -> Tensor:
    """Compares the files with the base's, byte for byte, and the function they make with the base's own of these values.

    Args:
        export: The folder it lies in, and the consent to the base's code.
        weights: The base's tensors.
        base: The base.
        trained: Name to the hash of the float32 values that were to be written, of every parameter that trained.

    Returns:
        The logits, (1, at most 32 tokens, vocabulary).

    Raises:
        CheckpointError: Naming the first tensor that differs and which side of the plan it is on, or the largest
            difference of a logit.
    """
    folder = Path(export.name)
    _check_frozen_bytes(folder, weights)
    found = export.skeleton()
    _check_values(folder, base, found, trained)
    # the values are equal, so that a difference is of config or code
    wanted_logits, found_logits = (
        run_streamed(each.model, found.reader.read, partial(compute_logits, each.model)) for each in (base, found)
    )
    difference = float((wanted_logits - found_logits).abs().max())
    if not difference <= LOGIT_BOUND * max(1.0, float(wanted_logits.abs().max())):
        raise CheckpointError(
            f"{folder}: after reloading, logits differ by up to {difference:.3g} from those of the trained model;"
            " its config.json does not describe it"
        )
    return found_logits


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


def _check_values(folder: Path, base: Skeleton, found: Skeleton, trained: Mapping[str, str]) -> None:
    """Every parameter of the files is the base's, or the one that was to be written, bit for bit."""
    wrong: dict[str, list[str]] = {"frozen": [], "trained": []}
    there = {name for name, _ in found.model.named_parameters()}
    for name, _ in base.model.named_parameters():
        wanted = trained[name] if name in trained else hash_tensor(base.reader.read(name))
        if name not in there or hash_tensor(found.reader.read(name)) != wanted:
            wrong["trained" if name in trained else "frozen"].append(name)
    for side, names in wrong.items():
        _refuse(folder, side, names)


def _refuse(folder: Path, side: str, wrong: list[str]) -> None:
    if wrong:
        raise CheckpointError(
            f"{folder}: after export {len(wrong)} {side} tensors are not what was expected; the first is {min(wrong)}"
        )
