"""What trained, read from a checkpoint one parameter at a time, and what is told of it on the way to the export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerplan.checkpoint.export_weights import BaseWeights, round_as_stored
from layerplan.models.freezing import hash_tensor
from layerplan.models.skeleton import Skeleton

ReadTrained = Callable[[str, Sequence[int]], Tensor]
"""From a parameter's name and shape to its trained values, float32."""


@dataclass
class TrainedValues:
    """Trained parameters of a checkpoint, exact and as they are exported."""

    base: Skeleton
    weights: BaseWeights
    read_exact: ReadTrained
    hashes: dict[str, str] = field(default_factory=dict)
    """Of every parameter that was read rounded: of its rounded values, float32."""
    changed: set[str] = field(default_factory=set)
    """Those whose rounded values are not the base's."""
    is_rounded: bool = False
    """Whether rounding moved one of them."""
    _shapes: dict[str, torch.Size] = field(init=False)
    """By name; values are read while the model runs too, and then it has no parameters to ask."""

    def __post_init__(self) -> None:
        self._shapes = {
            name: parameter.shape for name, parameter in self.base.model.named_parameters(remove_duplicate=False)
        }

    def read_rounded(self, name: str) -> Tensor:
        """A trained parameter at the precision it is exported in, float32; what it is is remembered.

        Raises:
            CheckpointError: When the checkpoint lacks it, or the dtype cannot hold a value.
        """
        exact = self._read(name)
        rounded = round_as_stored(self.weights, name, exact)
        self.is_rounded = self.is_rounded or not torch.equal(exact, rounded)
        del exact
        self.hashes[name] = hash_tensor(rounded)
        if not torch.equal(rounded, self.base.reader.read(name)):
            self.changed.add(name)
        return rounded

    def read_any(self, name: str) -> Tensor:
        """A trained parameter at full precision, or a frozen one."""
        return self._read(name) if name in self.weights.dtypes else self.base.reader.read(name)

    def _read(self, name: str) -> Tensor:
        return self.read_exact(name, self._shapes[name])
