"""Proof that frozen tensors keep their bytes: a checksum of each, taken where they live, sharded or whole.

A checksum is sum_i (2 i + 1) w_i modulo 2^64 over the words w_i of a tensor (a word is one element's bits, i its place
in the whole tensor). The factors are odd, so that no change of one word goes unnoticed, and shards add up to the
whole, so that the value depends neither on the number of workers nor on how the model is placed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from layerplan.artifacts import hash_bytes
from layerplan.errors import TrainingError
from layerplan.models.freezing import hf_name
from layerplan.train.materialize import find_rows

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20
"""Words per pass: the int64 copies of a chunk stay in a CPU's cache, and take 16 MiB on a GPU."""


class FrozenTensors:
    """The frozen parameters of a placed model, as they were when it was made.

    Every method is collective: all workers call it, and all get the same answer.
    """

    def __init__(self, model: nn.Module, dtype: str, world_size: int = 1) -> None:
        """Takes the checksums everything later is compared with.

        Args:
            model: The placed model.
            dtype: Name of the dtype the frozen half is held in; checksums of two dtypes cannot be compared.
            world_size: Workers that hold the model.

        Raises:
            TrainingError: When the workers hold different bytes.
        """
        self._tensors = {hf_name(name): p for name, p in model.named_parameters() if not p.requires_grad}
        self._world_size = world_size
        self._reference = compute_checksums(self._tensors, world_size)
        self.digest = f"{dtype}:{_digest(self._reference)}"
        """One value for all of them."""

    def __len__(self) -> int:
        return len(self._tensors)

    def check(self) -> None:
        """Computes every checksum again.

        Raises:
            TrainingError: Naming what changed.
        """
        now = compute_checksums(self._tensors, self._world_size)
        changed = [name for name, value in now.items() if value != self._reference[name]]
        if changed:
            raise TrainingError(
                f"frozen tensors: {len(changed)} of {len(now)} changed during training ({', '.join(changed[:3])}"
                f"{' ...' if len(changed) > 3 else ''}); no checkpoint was made of it"
            )

    def check_same_as(self, digest: str) -> None:
        """Compares with the value a checkpoint carries; values of another dtype say nothing and pass.

        Raises:
            TrainingError: When the model on disk is not the one the run began with.
        """
        if digest.partition(":")[0] == self.digest.partition(":")[0] and digest != self.digest:
            raise TrainingError(
                f"frozen tensors: the {len(self)} loaded now have checksum {self.digest[-12:]}, the run began with"
                f" {digest[-12:]}; the model's files changed between the attempts"
            )


def compute_checksums(tensors: Mapping[str, Tensor], world_size: int = 1) -> dict[str, int]:
    """Checksum of each tensor, equal on all workers.

    Raises:
        TrainingError: When workers that hold whole tensors hold different bytes.
    """
    if not tensors:
        return {}
    device = next(iter(tensors.values())).device
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    is_shard = torch.zeros(len(tensors), dtype=torch.bool, device=device)
    group = None
    for place, tensor in enumerate(tensors.values()):
        local, offset = tensor.detach(), 0
        if isinstance(tensor, DTensor):
            local = tensor.to_local().detach()
            for dim, placement in enumerate(tensor.placements):
                if isinstance(placement, Shard):
                    group, is_shard[place] = tensor.device_mesh.get_group(dim), True
                    offset = find_rows(tensor)[0] * (tensor.numel() // max(tensor.shape[0], 1))
        sums[place] = _sum_words(local, offset)
    if group is not None:
        total = sums.clone()
        dist.all_reduce(total, group=group)
        sums = torch.where(is_shard, total, sums)
    values = dict(zip(tensors, sums.tolist()))
    if world_size > 1:
        _check_agreement(values, sums)
    return values


def _sum_words(tensor: Tensor, offset: int) -> Tensor:
    words = tensor.contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    places = torch.arange(min(_CHUNK, words.numel()), device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        piece = words[start : start + _CHUNK].to(torch.int64)
        total += piece.sum() * (2 * (offset + start) + 1)
        total += 2 * (piece * places[: piece.numel()]).sum()
    return total


def _check_agreement(values: Mapping[str, int], sums: Tensor) -> None:
    """Two reductions find a worker that differs; the name follows from where they do."""
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    differing = [name for name, is_same in zip(values, (low == high).tolist()) if not is_same]
    if differing:
        raise TrainingError(
            f"frozen tensors: {len(differing)} of {len(values)} differ between workers ({', '.join(differing[:3])}"
            f"{' ...' if len(differing) > 3 else ''}); the model's files are not the same on every machine"
        )


def _digest(values: Mapping[str, int]) -> str:
    text = "\n".join(f"{name} {value}" for name, value in sorted(values.items()))
    return hash_bytes(text.encode())
