"""Distributed checkpoints: what trains and its optimizer state, by Hugging Face parameter name.

Frozen parameters are not saved: they are the base model's, and the export proves that its files hold the same bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from layerplan.checkpoint.metadata import read_metadata
from layerplan.checkpoint.seal import FileMark
from layerplan.checkpoint.storage import DataReader, MarkingWriter
from layerplan.errors import CheckpointError
from layerplan.models.freezing import hf_name
from layerplan.storage.paths import StoredPath


@dataclass
class Parked:
    """Parameters that trained in an earlier phase of the plan, or will in a later one, and are frozen now.

    Whole float32 tensors on the CPU, the same on every rank, so that they do not depend on how a phase places its model.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    """By Hugging Face name."""
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Optimizer state kept for when the parameter thaws."""


@dataclass(frozen=True)
class Saving:
    """A save that may still go on in the background."""

    folder: StoredPath
    marks: dict[str, FileMark]
    """Of every file, by name; whole on rank 0 after `wait`."""
    _future: Future[Any] | None = None

    def wait(self) -> None:
        """Returns once the shards of all ranks and the metadata are on disk.

        Raises:
            CheckpointError: When a rank could not write its own.
        """
        if self._future is not None:
            with writing(self.folder):
                self._future.result()


@contextmanager
def writing(folder: StoredPath) -> Iterator[None]:
    """Turns what fails while a checkpoint is written, as on a full disk, into one line that names its folder.

    Raises:
        CheckpointError: In place of an OSError, or of PyTorch's exception for a failed rank, which is no `Exception` and would
            end a thread without a word.
    """
    try:
        yield
    except (OSError, CheckpointException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no reason given")
        raise CheckpointError(f"{folder}: cannot be written ({reason})") from error


def save_checkpoint(
    path: StoredPath, model: nn.Module, optimizer: torch.optim.Optimizer, group: Any, parked: Parked | None = None
) -> Saving:
    """Starts saving in the background when there is a process group for it, else saves.

    Args:
        path: Folder of the checkpoint, the same on every rank.
        model: The training model, sharded or not.
        optimizer: Its optimizer.
        group: A gloo process group of the checkpoint's own, or None for a single process.
        parked: What other phases of the plan train.

    Raises:
        CheckpointError: When the optimizer lacks state for a trained parameter, or the folder cannot be written.
    """
    state = _collect_state(model, optimizer)
    if parked is not None:
        state["model"].update(parked.weights)
        state["optimizer"].update(parked.moments)
    writer = MarkingWriter(path)
    if group is None:
        with writing(path):
            dcp.save(state, storage_writer=writer, no_dist=not dist.is_initialized())
        return Saving(path, writer.marks)
    return Saving(path, writer.marks, dcp.async_save(state, storage_writer=writer, process_group=group))


def load_checkpoint(
    path: StoredPath, model: nn.Module, optimizer: torch.optim.Optimizer, *, fresh_moments: bool = False
) -> None:
    """Restores in place, onto any world size.

    Args:
        path: Folder of the checkpoint.
        model: The training model.
        optimizer: Its optimizer.
        fresh_moments: Whether a parameter the checkpoint has no moments for starts with zeros, as after a change of
            plan; otherwise its absence is an error.

    Raises:
        CheckpointError: When the checkpoint lacks what this plan trains.
    """
    state = _collect_state(model, optimizer)
    if fresh_moments:
        known = _list_moments(path)
        for name in [name for name in state["optimizer"] if name not in known]:
            for value in state["optimizer"].pop(name).values():
                if isinstance(value, Tensor):
                    value.zero_()
    _load(state, path)
    with torch.no_grad():
        for value in model.parameters():
            master = optimizer.state.get(value, {}).get("master")
            if master is not None:
                value.copy_(master)


def load_parked(path: StoredPath, like: dict[str, Tensor], *, keep_moments: bool) -> Parked:
    """Reads what this phase does not train from the checkpoint of the phase before.

    Args:
        path: Checkpoint folder.
        like: Name to a tensor of the wanted shape.
        keep_moments: Whether optimizer state found there is kept.

    Raises:
        CheckpointError: When the checkpoint lacks a weight.
    """
    parked = Parked(load_trained_tensors(path, like))
    if keep_moments:
        known = _list_moments(path)
        moments = {
            name: {key: torch.empty(size, dtype=torch.float32) for key, size in known[name].items()}
            for name in like
            if name in known
        }
        if moments:
            _load({"optimizer": moments}, path)
        parked.moments = moments
    return parked


def load_trained_tensors(path: StoredPath, like: dict[str, Tensor]) -> dict[str, Tensor]:
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


class TrainedReader:
    """Reads the trained parameters of a checkpoint one at a time, in one process, whatever world size saved them."""

    def __init__(self, path: StoredPath) -> None:
        """Reads the metadata; raises `CheckpointError` when that cannot be done."""
        self._path, self._metadata = path, read_metadata(path)

    def read(self, name: str, shape: Sequence[int]) -> Tensor:
        """A whole parameter, float32 on the CPU; raises `CheckpointError` when the checkpoint lacks it."""
        state = {"model": {name: torch.empty(tuple(shape), dtype=torch.float32)}}
        _load(state, self._path, self._metadata)
        return state["model"][name]


def _list_moments(path: StoredPath) -> dict[str, dict[str, torch.Size]]:
    """Parameters the checkpoint has optimizer state for, with the size of each part."""
    found: dict[str, dict[str, torch.Size]] = {}
    for flat, entry in read_metadata(path).state_dict_metadata.items():
        if flat.startswith("optimizer.") and isinstance(entry, TensorStorageMetadata):
            name, _, key = flat.removeprefix("optimizer.").rpartition(".")
            found.setdefault(name, {})[key] = entry.size
    return found


def _load(state: dict[str, Any], path: StoredPath, metadata: Metadata | None = None) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            dcp.load(state, storage_reader=DataReader(path, metadata), no_dist=not dist.is_initialized())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | CheckpointError):
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
