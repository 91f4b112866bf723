"""Which stored tensor of a donor becomes which of the stitched model, by the paths its parameters have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from layerplan.errors import ModelError
from layerplan.models.causal_lm import DecoderParts, find_decoder_parts
from layerplan.models.parameter_names import build_unloaded
from layerplan.models.stitching.donor import Donor
from layerplan.models.stitching.recipe import Recipe
from layerplan.models.tensor_map import TensorMap, map_tensors
from layerplan.models.weight_files import StoredTensor, read_stored_tensors
from layerplan.plan.stitch_report import LayerOrigin


@dataclass(frozen=True)
class DonorTensors:
    """A donor's stored tensors, each with the part of the decoder it belongs to."""

    model: Any
    """On the meta device."""
    parts: DecoderParts
    stored: dict[str, StoredTensor]
    placed: TensorMap

    def find_part(self, tensor: str) -> int | str:
        """Index of the layer a stored tensor feeds, or `embeddings`, `final_norm`, `lm_head` or `other`."""
        parts = self.parts
        for owner in self.placed.owners[tensor]:
            if owner.startswith(parts.layers_path + "."):
                return int(owner.removeprefix(parts.layers_path + ".").partition(".")[0])
            for part in ("embeddings", "final_norm", "lm_head"):
                if owner.startswith(f"{getattr(parts, part + '_path')}."):
                    return part
        return "other"


@dataclass(frozen=True)
class Placed:
    """One tensor to be written."""

    name: str
    donor: str
    source: str
    """Its name at the donor."""
    stored: StoredTensor
    layer: int | None
    """Index of its layer in the stitched model."""


def open_donor(donor: Donor) -> DonorTensors:
    """Reads a donor's headers and finds its parts; raises `ModelError` when they do not fit together."""
    model = build_unloaded(donor.ref)
    stored = read_stored_tensors(donor.ref.folder(with_weights=True))
    return DonorTensors(model, find_decoder_parts(model), stored, map_tensors(model, stored))


def place_tensors(recipe: Recipe, donors: dict[str, DonorTensors]) -> Iterator[Placed]:
    """Every tensor that a donor gives, ends first."""
    homes = {"embeddings": recipe.embeddings, "final_norm": recipe.final_norm, "lm_head": recipe.lm_head}
    for part in ("embeddings", "final_norm", "lm_head", "other"):
        name = homes.get(part, recipe.embeddings)
        for tensor, stored in donors[name].stored.items():
            if donors[name].find_part(tensor) == part:
                yield Placed(tensor, name, tensor, stored, None)
    for index, layer in enumerate(recipe.layers):
        if layer.donor is None or layer.donor_layer is None:
            continue
        given = donors[layer.donor]
        places = dict(enumerate(_list_parts(recipe, layer), layer.donor_layer))
        for tensor, stored in given.stored.items():
            at = given.find_part(tensor)
            if isinstance(at, int) and at in places:
                renamed = _name_in(places[at], given, tensor, index) if places[at] else rename_layer(tensor, at, index)
                yield Placed(renamed, layer.donor, tensor, stored, index)


def _list_parts(recipe: Recipe, layer: LayerOrigin) -> tuple[str, ...]:
    """Where in the layer each of the donor's layers goes that it is made of."""
    if layer.donor_span == 1:
        return ("",)
    from layerplan.models.hybrid.layer_kinds import find_donor_layers

    return find_donor_layers(str(recipe.donors[str(layer.donor)].config["model_type"]))[1].parts


def _name_in(part: str, given: DonorTensors, tensor: str, index: int) -> str:
    """A stored tensor's name where its layer is a part of one of a hybrid; raises `ModelError` for one that feeds several."""
    owners = given.placed.owners[tensor]
    if len(owners) != 1 or tensor in given.placed.converted:
        raise ModelError(f"{tensor}: feeds {', '.join(owners)} by a conversion; it cannot be moved as it is stored")
    _, _, inside = owners[0].removeprefix(given.parts.layers_path + ".").partition(".")
    return f"model.layers.{index}.{part}.{inside}"


def rename_layer(tensor: str, layer: int, index: int) -> str:
    """A stored tensor's name at another index: the first number in it is its layer's.

    Raises:
        ModelError: When it is not.
    """
    match = re.search(r"(?<=\.)\d+(?=\.)", tensor)
    if match is None or int(match.group()) != layer:
        raise ModelError(f"{tensor}: belongs to layer {layer}, which its name does not say; it cannot be moved")
    return tensor[: match.start()] + str(index) + tensor[match.end() :]
