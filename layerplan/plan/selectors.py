"""Selectors of decoder layers and of the parts around them, as a user writes them in a plan."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from layerplan.errors import PlanError
from layerplan.plan.layer_profile import LayerProfile
from layerplan.plan.model_shape import LayerKind, ModelShape

_RANGE = re.compile(r"^(-?\d*):(-?\d*)$")
END_ROLES = ("embeddings", "final_norm", "lm_head")
"""Parts around the layers."""
_KINDS_WITH: dict[str, tuple[LayerKind, ...]] = {
    "attention": ("decoder", "attention"),
    "mlp": ("decoder", "mlp"),
    "mamba2": ("mamba2",),
    "recurrent": ("mamba2", "recurrent", "recurrent_decoder"),
}
"""Role of a layer to the kinds of layers that play it."""


@dataclass(frozen=True)
class Selection:
    """What selectors name together."""

    layers: tuple[int, ...]
    """Sorted layer indices."""
    ends: frozenset[str] = frozenset()
    """Which of `END_ROLES`."""


def select(selectors: Sequence[str | int], shape: ModelShape, profile: LayerProfile | None = None) -> Selection:
    """Returns the layers and parts the selectors name together.

    Raises:
        PlanError: When a selector is malformed, matches nothing, or repeats what another one named.
    """
    chosen: dict[int | str, str | int] = {}
    for selector in selectors:
        for item in _select(selector, shape, profile):
            if item in chosen:
                what = f"layer {item}" if isinstance(item, int) else item
                raise PlanError(f"plan.trainable: {selector!r} and {chosen[item]!r} both select {what}")
            chosen[item] = selector
    layers = tuple(sorted(item for item in chosen if isinstance(item, int)))
    return Selection(layers, frozenset(item for item in chosen if isinstance(item, str)))


def space_layers(count: int, num_layers: int) -> tuple[int, ...]:
    """The middles of `count` equal stretches of the depth.

    Example:
        >>> space_layers(3, 12)
        (2, 6, 10)
    """
    return tuple((2 * place + 1) * num_layers // (2 * count) for place in range(count))


def name_parameters(shape: ModelShape) -> dict[str, int | str]:
    """Names a pattern is matched against, as most families have them, to the layer or part they belong to."""
    layers: dict[str, int | str] = {f"model.layers.{layer}.": layer for layer in range(shape.num_layers)}
    return {
        "model.embed_tokens.weight": "embeddings",
        **layers,
        "model.norm.weight": "final_norm",
        "lm_head.weight": "lm_head",
    }


def _select(selector: str | int, shape: ModelShape, profile: LayerProfile | None) -> list[int] | list[int | str]:
    text, num_layers = str(selector).strip(), shape.num_layers
    kind, _, rest = text.partition(":")
    if re.fullmatch(r"-?\d+", text):
        return _by_index(int(text), num_layers)
    if match := _RANGE.match(text):
        start, stop = (int(group) if group else None for group in match.groups())
        layers = list(range(num_layers))[start:stop]
        if not layers:
            nearest = 0 if (stop or 0) < 0 or (start or 0) < num_layers else num_layers - 1
            raise PlanError(f"plan.trainable: {text!r} matches no layer; the nearest is model.layers.{nearest}")
        return layers
    if kind in ("first", "last"):
        return _by_share(kind, rest, num_layers, text)
    if kind == "re":
        return _by_pattern(rest, shape, text)
    if kind == "role":
        return _by_role(rest, shape, text)
    if kind == "top":
        return _by_metric(rest, profile, text)
    raise PlanError(
        f"plan.trainable: {text!r} is not a selector; use an index, start:stop, first:SHARE, last:SHARE, re:PATTERN,"
        " role:NAME or top:K:METRIC"
    )


def _by_index(index: int, num_layers: int) -> list[int]:
    if not -num_layers <= index < num_layers:
        nearest = 0 if index < 0 else num_layers - 1
        raise PlanError(f"plan.trainable: layer {index} does not exist; the nearest is model.layers.{nearest}")
    return [index % num_layers]


def _by_share(end: str, share: str, num_layers: int, text: str) -> list[int]:
    try:
        value = Fraction(share)
    except (ValueError, ZeroDivisionError):
        raise PlanError(f"plan.trainable: {text!r}: {share!r} is not a share such as 0.5 or 1/3") from None
    if not 0 < value <= 1:
        raise PlanError(f"plan.trainable: {text!r}: the share must lie in (0, 1]")
    count = max(1, int(value * num_layers + Fraction(1, 2)))
    return list(range(count)) if end == "first" else list(range(num_layers - count, num_layers))


def _by_pattern(pattern: str, shape: ModelShape, text: str) -> list[int | str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise PlanError(f"plan.trainable: {text!r} is not a regular expression ({error})") from None
    names = name_parameters(shape)
    found = [item for name, item in names.items() if compiled.search(name)]
    if not found:
        plain = pattern.replace("\\", "")
        nearest = max(names, key=lambda name: difflib.SequenceMatcher(None, plain, name).ratio())
        raise PlanError(f"plan.trainable: {text!r} matches no parameter; the nearest is {nearest}")
    return found


def _by_role(role: str, shape: ModelShape, text: str) -> list[int | str]:
    if role in END_ROLES:
        return [role]
    roles = (*END_ROLES, *_KINDS_WITH)
    if role not in _KINDS_WITH:
        nearest = difflib.get_close_matches(role, roles, n=1, cutoff=0.0)[0]
        raise PlanError(f"plan.trainable: {text!r} is no role; the nearest is role:{nearest} (of {', '.join(roles)})")
    layers = [layer for layer in range(shape.num_layers) if shape.kind(layer) in _KINDS_WITH[role]]
    if not layers:
        kinds = sorted({shape.kind(layer) for layer in range(shape.num_layers)})
        raise PlanError(f"plan.trainable: {text!r} matches no layer; the model's layers are {', '.join(kinds)}")
    return [*layers]


def _by_metric(rest: str, profile: LayerProfile | None, text: str) -> list[int]:
    count, _, metric = rest.partition(":")
    if profile is None:
        raise PlanError(f"plan.trainable: {text!r} needs a layer profile; trace the model first")
    values = {"sensitivity": profile.layer_sensitivity, "task_particle": profile.task_particle}.get(metric)
    if values is None or not count.isdigit() or not 1 <= int(count) <= len(values):
        raise PlanError(f"plan.trainable: {text!r}: expected top:K:sensitivity or top:K:task_particle")
    return sorted(sorted(range(len(values)), key=lambda layer: (-values[layer], layer))[: int(count)])
