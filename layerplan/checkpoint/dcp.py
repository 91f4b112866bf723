"""Distributed checkpoints: what trains and its optimizer state, by Hugging Face parameter name.

Frozen parameters are not saved: they are the base model's, byte for byte, and the export proves it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from layerplan.errors import CheckpointError
from layerplan.models.freezing import hf_name


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Any) -> Any:
    """Starts saving; returns a future when a process group can save in the background, else None after saving.

    Args:
        path: Folder of the checkpoint, the same on every rank.
        model: The training model, sharded or not.
        optimizer: Its optimizer.
        group: A gloo process group of the checkpoint's own, or None for a single process.
    """
    state = _collect_state(model, optimizer)
    if group is None:
        dcp.save(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        return None
    return dcp.async_save(state, checkpoint_id=path, process_group=group)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores in place, onto any world size.

    Raises:
        CheckpointError: When the checkpoint lacks what this plan trains.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    _load(_collect_state(model, optimizer), path)


def load_trained_tensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reads trained parameters in one process, whatever world size saved them.

    Args:
        path: Checkpoint folder.
        like: Name to a tensor of the wanted shape.

    Returns:
        Name to a float32 tensor on the CPU.
    """
    state = {"model": {name: torch.empty(tensor.shape, dtype=torch.float32) for name, tensor in like.items()}}
    _load(state, path)
    return state["model"]


def _load(state: dict[str, Any], path: Path) -> None:
    try:
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{path}: cannot be loaded ({lines[-1].strip() if lines else type(error).__name__})") from None


def _collect_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors themselves, not copies: loading writes into them."""
    trained = {hf_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    return {
        "model": {name: value.detach() for name, value in trained.items()},
        "optimizer": {name: dict(optimizer.state[value]) for name, value in trained.items()},
    }
