"""Where the layers and tensors of a stitched model come from; `stitch.json` beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from layerplan.artifacts import compute_sha256, read_sealed, write_sealed
from layerplan.config.base import StrictModel
from layerplan.plan.layer_profile import ModelIdentity


class LayerOrigin(StrictModel):
    """Where one layer comes from."""

    kind: str
    """What it is: a kind of layers of a hybrid, or the model type of its donor."""
    donor: str | None = None
    """Name of the donor; None for a layer that was initialised."""
    donor_layer: int | None = None
    """Its index there; of the first, where several neighbours became one layer."""
    donor_span: int = Field(default=1, ge=1)
    """How many of the donor's layers it is made of."""
    is_copy: bool = False
    """Inserted behind its original, its output projections at zero."""

    @property
    def is_new(self) -> bool:
        """Whether the layer was added to what the donors had."""
        return self.donor is None or self.is_copy


def list_layers(origins: Sequence[LayerOrigin], wanted: Literal["new", "donor"]) -> tuple[int, ...]:
    """Indices of the layers that were added, or of those taken over."""
    return tuple(index for index, layer in enumerate(origins) if layer.is_new == (wanted == "new"))


class TensorOrigin(StrictModel):
    """Where one stored tensor comes from: its bytes are those of a donor's, or it was initialised."""

    name: str
    """In the stitched model."""
    donor: str | None = None
    """Name of the donor."""
    donor_tensor: str | None = None
    """Name there."""
    initialised: str | None = None
    """How, when it is no donor's: the values it got."""


class Seam(StrictModel):
    """Two neighbours of other origins, and what the upper one is given there."""

    layer: int
    """Index of the upper one."""
    below: str
    """Origin of the lower one."""
    above: str
    """Origin of the upper one."""
    arriving_rms: float
    """Root mean square of the residual stream that arrives, median over tokens."""
    expected_rms: float | None = None
    """The same where the upper layer stands in its donor; None for a new one."""

    @property
    def ratio(self) -> float | None:
        """What arrives over what the layer was trained on."""
        return None if not self.expected_rms else self.arriving_rms / self.expected_rms


class StitchReport(StrictModel):
    """The initialisation of a stitched model, tensor by tensor."""

    schema_version: int = 1
    """Version of this layout."""
    donors: dict[str, ModelIdentity]
    """Who they are."""
    layers: tuple[LayerOrigin, ...] = Field(min_length=1)
    """One entry per decoder layer."""
    tensors: tuple[TensorOrigin, ...]
    """One entry per stored tensor."""
    seams: tuple[Seam, ...] = ()
    """Where origins change."""
    seed: int
    """Of what was initialised."""
    keeps_logits: bool | None = None
    """Whether the model's logits are bit for bit its donor's; None where nothing says that they should be."""
    sha256: str = ""
    """Hash over every other field."""

    def describe(self) -> list[str]:
        """The counts, and every seam, a line each."""
        copied = sum(tensor.donor is not None for tensor in self.tensors)
        lines = [
            f"{len(self.layers)} layers, {len(list_layers(self.layers, 'new'))} of them added; {copied} tensors are their donors'"
            f" byte for byte, {len(self.tensors) - copied} initialised with seed {self.seed}"
        ]
        for seam in self.seams:
            found = f"layer {seam.layer} ({seam.above}) is given a residual of {seam.arriving_rms:.3g} by {seam.below}"
            expected = (
                "" if seam.ratio is None else f"; in its donor it is {seam.expected_rms:.3g} ({seam.ratio:.2g} of it)"
            )
            lines.append(found + expected)
        if self.keeps_logits:
            lines.append("before the first step its logits are its donor's, bit for bit")
        return lines

    def save(self, path: Path) -> None:
        """Writes the sealed report as JSON."""
        digest = compute_sha256(self.model_dump(mode="json", exclude={"sha256"}))
        write_sealed(path, self.model_copy(update={"sha256": digest}))

    @classmethod
    def load(cls, path: Path) -> StitchReport:
        """Reads a report; raises `PlanError` when it is missing, malformed or changed."""
        return read_sealed(path, cls)
