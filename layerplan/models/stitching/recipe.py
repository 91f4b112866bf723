"""From a stitch spec and the donors' configs to the model's own config and the source of every layer; no weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerplan.config.stitch import ExpansionConfig, StitchedModelConfig
from layerplan.errors import ModelError
from layerplan.models.files import count_layers
from layerplan.models.own_types import HYBRID_TYPE
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.donor import Donor
from layerplan.models.stitching.hybrid_recipe import compose_hybrid
from layerplan.plan.layer_profile import LayerProfile
from layerplan.plan.stitch_report import LayerOrigin

UNLIKE = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "layer_types", "max_window_layers",
    "model_type", "num_hidden_layers", "pad_token_id", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
    "vocab_size",
}  # fmt: skip
"""Fields in which donors may differ: what the ends decide, or what says nothing about a layer."""
_RANGE = re.compile(r"(\d*):(\d*)")


@dataclass(frozen=True)
class Recipe:
    """What is to be written."""

    config: dict[str, Any]
    """The model's own config."""
    layers: tuple[LayerOrigin, ...]
    """Source of every decoder layer."""
    donors: Mapping[str, Donor]
    embeddings: str
    """Donor of the input embedding, of the tokenizer, and of what belongs to no other part."""
    final_norm: str
    """Donor of the last norm."""
    lm_head: str
    """Donor of the head."""
    is_expansion: bool

    @property
    def trust_remote_code(self) -> bool:
        """Whether code of the donor may build the model too; a hybrid's code is ours."""
        return self.donors[self.embeddings].ref.trust_remote_code and self.config["model_type"] != HYBRID_TYPE


def read_donor(ref: ModelRef, *, published: Mapping[str, Any] | None = None) -> Donor:
    """A donor's config and depth; raises `ModelError` when its config is missing or no language model's.

    Args:
        ref: The donor, a folder or a hub id.
        published: Values of its config that are at hand already.
    """
    config = published or ref.config()
    return Donor(ref, config, count_layers(config))


def resolve_recipe(spec: StitchedModelConfig, donors: Mapping[str, Donor]) -> Recipe:
    """Settles every layer's source and the model's config.

    Raises:
        ModelError: Naming the field, for a layer out of range or used twice, donors whose layers do not fit together, a
            kind of layers that there is not, or ends that do not fit each other.
    """
    layers = _list_expanded(spec.expand, donors) if spec.expand is not None else _list_layers(spec, donors)
    used = [name for name in donors if any(layer.donor == name for layer in layers)]
    base = donors[spec.first_donor]
    types = {str(donors[name].config["model_type"]) for name in (spec.first_donor, *used)}
    is_hybrid = len(types) > 1 or any(layer.donor is None for layer in layers)
    for name in used:
        _refuse_other_sizes(name, donors[name], spec.first_donor, base)
    ends = {"final_norm": spec.final_norm, "lm_head": spec.lm_head}
    norm, head = (ends[field] or spec.first_donor for field in ("final_norm", "lm_head"))
    _refuse_other_ends(spec, donors, norm, head)
    if is_hybrid:
        layers, config = compose_hybrid(spec, base, donors, layers)
    else:
        config = _make_config(base, donors, layers)
    return Recipe(config, tuple(layers), donors, spec.first_donor, norm, head, spec.expand is not None)


def _list_layers(spec: StitchedModelConfig, donors: Mapping[str, Donor]) -> list[LayerOrigin]:
    found: list[LayerOrigin] = []
    seen: dict[tuple[str, int], str] = {}
    for index, run in enumerate(spec.layers or ()):
        field = f"model.layers.{index}"
        if run.kind is not None:
            found += [LayerOrigin(kind=run.kind)] * (run.count or 1)
            continue
        assert run.donor is not None and run.layers is not None, "the config gives one of both"
        donor = donors[run.donor]
        for layer in _read_layers(run.layers, donor.num_layers, field, run.donor):
            if (run.donor, layer) in seen:
                raise ModelError(
                    f"{field}: layer {layer} of {run.donor} is used by {seen[run.donor, layer]} already; a donor's layer"
                    " stands in one place (copies of layers are model.expand)"
                )
            seen[run.donor, layer] = field
            found.append(LayerOrigin(kind=str(donor.config["model_type"]), donor=run.donor, donor_layer=layer))
    return found


def _read_layers(layers: str | Sequence[int], num_layers: int, field: str, donor: str) -> list[int]:
    if not isinstance(layers, str):
        chosen = list(layers)
    elif match := _RANGE.fullmatch(layers.strip()):
        start, stop = (int(group) if group else default for group, default in zip(match.groups(), (0, num_layers)))
        chosen = list(range(start, stop))
    else:
        raise ModelError(f"{field}.layers={layers!r}: is no half-open range such as 14:28, nor a list of indices")
    wrong = [layer for layer in chosen if not 0 <= layer < num_layers]
    if wrong or not chosen:
        what = f"layer {wrong[0]} does not exist" if wrong else "names no layer"
        raise ModelError(f"{field}.layers={layers!r}: {what}; {donor} has layers 0 to {num_layers - 1}")
    return chosen


def _list_expanded(expansion: ExpansionConfig, donors: Mapping[str, Donor]) -> list[LayerOrigin]:
    ((name, donor),) = donors.items()
    kind = str(donor.config["model_type"])
    places = _choose_places(expansion, donor.num_layers)
    layers: list[LayerOrigin] = []
    for index in range(donor.num_layers):
        layers.append(LayerOrigin(kind=kind, donor=name, donor_layer=index))
        layers += [LayerOrigin(kind=kind, donor=name, donor_layer=index, is_copy=True)] * places.count(index)
    return layers


def _choose_places(expansion: ExpansionConfig, num_layers: int) -> list[int]:
    """Donor layers behind which a copy goes."""
    if isinstance(expansion.after, list):
        places = _read_layers(expansion.after, num_layers, "model.expand.after", "the donor")
        if len(set(places)) < len(places):
            raise ModelError(f"model.expand.after={expansion.after}: names a layer twice; one copy goes behind a layer")
        return places
    copies = expansion.copies or 0
    largest = num_layers - 1 if expansion.after == "profile" else num_layers
    if copies > largest:
        raise ModelError(f"model.expand.copies={copies}: must lie in 1..{largest} for a donor of {num_layers} layers")
    if expansion.after == "even":
        return [(number + 1) * num_layers // copies - 1 for number in range(copies)]
    return _most_sensitive(Path(str(expansion.profile)).expanduser(), copies, num_layers)


def _most_sensitive(path: Path, copies: int, num_layers: int) -> list[int]:
    profile = LayerProfile.load(path)
    if profile.model.num_layers != num_layers:
        raise ModelError(
            f"model.expand.profile={path}: is of a model of {profile.model.num_layers} layers, the donor has {num_layers}"
        )
    values = profile.layer_sensitivity
    return sorted(sorted(range(len(values)), key=lambda layer: (-values[layer], layer))[:copies])


def _refuse_other_sizes(name: str, donor: Donor, first: str, base: Donor) -> None:
    mine, theirs = dict(donor.config), dict(base.config)
    if mine.get("hidden_size") != theirs.get("hidden_size"):
        raise ModelError(
            f"model.donors.{name}: hidden_size={mine.get('hidden_size')}, but {first} has {theirs.get('hidden_size')};"
            " layers share one residual stream"
        )
    if mine["model_type"] != theirs["model_type"]:
        return  # layers of several kinds, of which a hybrid is made or not
    for field in sorted((set(mine) | set(theirs)) - UNLIKE):
        if mine.get(field) != theirs.get(field):
            raise ModelError(
                f"model.donors.{name}: {field}={mine.get(field)!r}, but {first} has {theirs.get(field)!r}; layers of one"
                " model share it"
            )


def _refuse_other_ends(spec: StitchedModelConfig, donors: Mapping[str, Donor], norm: str, head: str) -> None:
    base = donors[spec.first_donor]
    is_tied = bool(base.config.get("tie_word_embeddings"))
    if is_tied and head != spec.first_donor:
        raise ModelError(
            f"model.lm_head={head}: {spec.first_donor} ties its head to its embedding, which is the head here"
        )
    for field, name in (("final_norm", norm), ("lm_head", head)):
        for key in (
            "model_type",
            "hidden_size",
            *(("vocab_size", "tie_word_embeddings") if field == "lm_head" else ()),
        ):
            if donors[name].config.get(key) != base.config.get(key):
                raise ModelError(
                    f"model.{field}={name}: {key}={donors[name].config.get(key)}, but {spec.first_donor} has"
                    f" {base.config.get(key)}"
                )


def _make_config(base: Donor, donors: Mapping[str, Donor], layers: Sequence[LayerOrigin]) -> dict[str, Any]:
    """The base's own config with another number of layers; lists of one entry per layer follow their layers."""
    config = dict(base.config)
    for field, value in base.config.items():
        if isinstance(value, list) and len(value) == base.num_layers:
            config[field] = [donors[str(layer.donor)].config[field][layer.donor_layer or 0] for layer in layers]
        elif value == base.num_layers and field in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            config[field] = len(layers)
    if count_layers(config) != len(layers):
        raise ModelError(
            f"model.donors: a {base.config['model_type']} does not say in its config how many layers it has; another number"
            " of them cannot be asked for"
        )
    return config
