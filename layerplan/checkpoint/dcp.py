"""Distributed checkpoints: what trains and its optimizer state, by Hugging Face parameter name.

Frozen parameters are not saved: they are the base model's, byte for byte, and the export proves it.
"""

from __future__ import annotations

import warnings
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

    Raises:
        CheckpointError: When the optimizer lacks state for a trained parameter.
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
    _load(_collect_state(model, optimizer), path)
    with torch.no_grad():
        for value in model.parameters():
            master = optimizer.state.get(value, {}).get("master")
            if master is not None:
                value.copy_(master)


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
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"{path}: cannot be loaded ({lines[-1].strip() if lines else type(error).__name__})"
        ) from None


def _collect_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors themselves, not copies: loading writes into them.

    Parameters are saved in float32, from the optimizer's master where the weight is only its rounded copy, so that a
    checkpoint does not depend on how the run placed its parameters.

    Raises:
        CheckpointError: When the optimizer has no state for a trained parameter, as while FSDP has it gathered.
    """
    trained = {hf_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    strangers = [name for name, value in trained.items() if value not in optimizer.state]
    if strangers:
        raise CheckpointError(f"the optimizer has no state for {len(strangers)} trained parameters: {strangers[0]} ...")
    return {
        "model": {name: optimizer.state[value].get("master", value).detach() for name, value in trained.items()},
        "optimizer": {
            name: {key: part for key, part in optimizer.state[value].items() if key != "master"}
            for name, value in trained.items()
        },
    }
