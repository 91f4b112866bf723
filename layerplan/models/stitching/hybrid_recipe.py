"""The config and the layers of a hybrid: which neighbours of a donor become one layer, and whose sizes a kind has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerplan.config.stitch import StitchedModelConfig
from layerplan.errors import ModelError
from layerplan.models.own_types import HYBRID_CLASS, HYBRID_TYPE, make_known
from layerplan.models.stitching.donor import Donor
from layerplan.plan.stitch_report import LayerOrigin

_DROPPED = ("architectures", "model_type", "num_hidden_layers", "layer_types", "max_window_layers", "auto_map")


def compose_hybrid(
    spec: StitchedModelConfig, base: Donor, donors: Mapping[str, Donor], layers: Sequence[LayerOrigin]
) -> tuple[list[LayerOrigin], dict[str, Any]]:
    """Layers by kind, and the hybrid's config.

    Args:
        spec: What the user asked for.
        base: Donor of the embedding.
        donors: All of them.
        layers: New layers by their kinds, and donors' layers one by one.

    Raises:
        ModelError: For a donor whose layers no kind takes, neighbours that are no layer together, sizes that differ, or
            a kind that there is not.
    """
    make_known(HYBRID_TYPE)
    from layerplan.models.hybrid.config import HybridConfig

    _refuse_other_base(spec.first_donor, base)
    found = _join_neighbours(donors, layers)
    values = {name: value for name, value in base.config.items() if name not in _DROPPED}
    values |= {"layer_kinds": [layer.kind for layer in found], "kind_sizes": _settle_sizes(spec, donors, found)}
    if base.config.get("use_sliding_window"):
        raise ModelError(
            f"model.donors.{spec.first_donor}: use_sliding_window=true; a hybrid's attention reads every token"
        )
    try:
        config: dict[str, Any] = HybridConfig(**values, architectures=[HYBRID_CLASS]).to_dict()
    except Exception as error:  # the config's class checks values in its own way
        raise ModelError(f"model: {_last_line(error)}") from None
    return found, config


def _refuse_other_base(name: str, base: Donor) -> None:
    from layerplan.models.hybrid.layer_kinds import ENDS_TYPE, find_donor_layers

    model_type = str(base.config["model_type"])
    try:
        find_donor_layers(model_type)
    except ValueError as error:
        raise ModelError(f"model.donors.{name}: {error}") from None
    if model_type != ENDS_TYPE:
        raise ModelError(
            f"model.embeddings={name}: is a {model_type}; embedding, final norm and head of a hybrid are those of a"
            f" {ENDS_TYPE}"
        )


def _join_neighbours(donors: Mapping[str, Donor], layers: Sequence[LayerOrigin]) -> list[LayerOrigin]:
    """Donors' layers as layers of a kind, as many neighbours to one as the kind takes."""
    from layerplan.models.hybrid.layer_kinds import find_donor_layers

    found: list[LayerOrigin] = []
    waiting = list(layers)
    while waiting:
        first = waiting[0]
        if first.donor is None or first.donor_layer is None:
            found.append(waiting.pop(0))
            continue
        donor = donors[first.donor]
        try:
            kind, given = find_donor_layers(str(donor.config["model_type"]))
        except ValueError as error:
            raise ModelError(f"model.donors.{first.donor}: {error}") from None
        span = len(given.parts)
        wanted = [(first.donor, first.donor_layer + offset) for offset in range(span)]
        try:
            given.check(donor.config, first.donor_layer)
        except ValueError as error:
            raise ModelError(f"model.layers: of {first.donor}, {error}") from None
        if [(layer.donor, layer.donor_layer) for layer in waiting[:span]] != wanted:
            raise ModelError(
                f"model.layers: of {first.donor}, layer {first.donor_layer} stands without {wanted[-1][1]}; the two are one"
                f" {kind} layer and stand together"
            )
        found.append(first.model_copy(update={"kind": kind, "donor_span": span}))
        del waiting[:span]
    return found


def _settle_sizes(
    spec: StitchedModelConfig, donors: Mapping[str, Donor], layers: Sequence[LayerOrigin]
) -> dict[str, dict[str, Any]]:
    """Sizes of every kind: what its donors have, and what the config gives where there are none."""
    from layerplan.models.hybrid.layer_kinds import find_donor_layers

    settled = {kind: dict(sizes) for kind, sizes in spec.kind_sizes.items()}
    whose = dict.fromkeys(settled, "model.kind_sizes")
    for name in dict.fromkeys(layer.donor for layer in layers if layer.donor is not None):
        kind, given = find_donor_layers(str(donors[name].config["model_type"]))
        sizes = given.read_sizes(donors[name].config)
        for field in sorted(set(sizes) & set(settled.get(kind, {}))):
            if settled[kind][field] != sizes[field]:
                raise ModelError(
                    f"model.donors.{name}: {field}={sizes[field]!r}, but {whose[kind]} has {settled[kind][field]!r}; all"
                    f" {kind} layers of a model share it"
                )
        if sizes:
            settled[kind] = settled.get(kind, {}) | sizes
            whose[kind] = name
    return settled


def _last_line(error: Exception) -> str:
    """What was said first by whoever found the fault; transformers wraps it into lines of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).removeprefix("ValueError: ")
