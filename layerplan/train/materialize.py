"""Gives a placed model its values: each worker reads from the base's files what it holds, in the dtype it holds it in.

A model is built without memory, planned and sharded; only then are weights read, of a sharded parameter the rows of this
worker. So memory never holds more than what stays there, and a buffer for what is converted on its way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from layerplan.models.adapters import name_in_base
from layerplan.models.parameter_reader import ParameterReader


@dataclass(frozen=True)
class ParameterSource:
    """Where values come from: the base's files, or whole tensors that other phases of a plan have changed."""

    reader: ParameterReader
    changed: dict[str, Tensor] = field(default_factory=dict)
    """By Hugging Face name, float32."""

    @torch.no_grad()
    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """Rows of a parameter, as many as `out` has, from `first_row` on."""
        known = name if name in self.reader else name_in_base(name)
        if known in self.changed:
            value = self.changed[known]
            out.copy_(value[first_row : first_row + len(out)] if out.ndim else value)
            return
        self.reader.read_into(known, out, first_row)


def fill_parameters(model: nn.Module, source: ParameterSource, device: torch.device) -> dict[int, Tensor]:
    """Replaces every parameter on the meta device by one with values; the others stay.

    Args:
        model: By whose names the source knows its parameters; sharded by FSDP or not.
        source: Where the values are.
        device: Where they go.

    Returns:
        id of a trained parameter of low precision to its float32 original.
    """
    masters: dict[int, Tensor] = {}
    filled: dict[nn.Parameter, nn.Parameter] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in filled:
                filled[parameter] = _fill(names[parameter], parameter, source, device, masters)
            module._parameters[key] = filled[parameter]
    return masters


def find_rows(parameter: DTensor) -> tuple[int, int]:
    """First row this worker holds of a sharded parameter, and the one after its last.

    FSDP shards the first dimension in equal chunks; the last ones are shorter, or empty.
    """
    rows = parameter.shape[0] if parameter.ndim else 1
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            chunk = math.ceil(rows / parameter.device_mesh.size(dim))
            start = min(rows, parameter.device_mesh.get_local_rank(dim) * chunk)
            return start, min(rows, start + chunk)
    return 0, rows


def _fill(
    name: str, parameter: nn.Parameter, source: ParameterSource, device: torch.device, masters: dict[int, Tensor]
) -> nn.Parameter:
    if isinstance(parameter, DTensor):
        start, stop = find_rows(parameter)
        local = torch.empty((stop - start, *parameter.shape[1:]), dtype=parameter.dtype, device=device)
        source.read_into(name, local, start)
        sharded = DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return nn.Parameter(sharded, requires_grad=parameter.requires_grad)
    keeps_master = parameter.requires_grad and parameter.dtype != torch.float32
    value = torch.empty(parameter.shape, dtype=torch.float32 if keeps_master else parameter.dtype, device=device)
    source.read_into(name, value)
    made = nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
    if keeps_master:
        masters[id(made)] = value
    return made
