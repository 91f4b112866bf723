"""What stands on both sides of a seam: the size of the residual stream, here and where the donor's layers come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.head import make_inputs
from layerplan.plan.stitch_report import LayerOrigin, Seam

SHAPE = (4, 64)
"""Rows and tokens of the sample; the tokens are drawn, since nothing is known of any text here."""


def draw_sample(vocab_size: int) -> Tensor:
    """Token ids, the same for every model of a vocabulary."""
    return torch.randint(0, vocab_size, SHAPE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def measure_residuals(model: nn.Module, ids_BT: Tensor) -> tuple[list[float], Tensor]:
    """Root mean square of what each layer is given, median over tokens; and the logits."""
    found: list[float] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states = (args[0] if args else kwargs["hidden_states"]).float()
        found.append(float(states.square().mean(-1).sqrt().median()))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in find_decoder_parts(model).layers]
    try:
        logits: Tensor = model(**make_inputs(model, ids_BT)).logits
    finally:
        for handle in handles:
            handle.remove()
    return found, logits


def compare_sides(
    layers: Sequence[LayerOrigin], arriving: Sequence[float], expected: Mapping[str, Sequence[float]]
) -> tuple[Seam, ...]:
    """Every place where a layer stands on one that it did not stand on before; a copy without effect stands for nothing.

    Args:
        layers: Origins from the embeddings up.
        arriving: What each layer is given in the stitched model.
        expected: The same of each donor's layers in the donor.
    """
    seams = []
    whole = [(index, layer) for index, layer in enumerate(layers) if not layer.is_copy]
    for (_, below), (index, above) in pairwise(whole):
        is_whole = above.donor == below.donor and not above.is_new and not below.is_new
        if is_whole and above.donor_layer == (below.donor_layer or 0) + below.donor_span:
            continue
        if below.is_new and above.is_new:
            continue
        known = None if above.donor is None else expected[above.donor][above.donor_layer or 0]
        seams.append(
            Seam(layer=index, below=_name(below), above=_name(above), arriving_rms=arriving[index], expected_rms=known)
        )
    return tuple(seams)


def _name(layer: LayerOrigin) -> str:
    if layer.donor is None:
        return f"a new {layer.kind} layer"
    if layer.donor_span > 1:
        return f"layers {layer.donor_layer} to {(layer.donor_layer or 0) + layer.donor_span - 1} of {layer.donor}"
    return f"layer {layer.donor_layer} of {layer.donor}"
