"""Selectors of decoder layers, as a user writes them in a plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from layerplan.errors import PlanError
from layerplan.plan.layer_profile import LayerProfile

_RANGE = re.compile(r"^(-?\d*):(-?\d*)$")


def select_layers(
    selectors: Sequence[str | int], num_layers: int, profile: LayerProfile | None = None
) -> tuple[int, ...]:
    """Returns the sorted layer indices the selectors name together.

    Raises:
        PlanError: When a selector is malformed, matches no layer, or repeats a layer another one named.
    """
    chosen: dict[int, str | int] = {}
    for selector in selectors:
        for layer in _select(selector, num_layers, profile):
            if layer in chosen:
                raise PlanError(f"plan.trainable: {selector!r} and {chosen[layer]!r} both select layer {layer}")
            chosen[layer] = selector
    return tuple(sorted(chosen))


def _select(selector: str | int, num_layers: int, profile: LayerProfile | None) -> list[int]:
    text = str(selector).strip()
    kind, _, rest = text.partition(":")
    if re.fullmatch(r"-?\d+", text):
        layers = _by_index(int(text), num_layers)
    elif match := _RANGE.match(text):
        start, stop = (int(group) if group else None for group in match.groups())
        layers = list(range(num_layers))[start:stop]
    elif kind in ("first", "last"):
        layers = _by_share(kind, rest, num_layers, text)
    elif kind == "re":
        layers = _by_pattern(rest, num_layers, text)
    elif kind == "top":
        layers = _by_metric(rest, profile, text)
    else:
        raise PlanError(
            f"plan.trainable: {text!r} is not a selector; use an index, start:stop, first:SHARE, last:SHARE, re:PATTERN"
            " or top:K:METRIC"
        )
    if not layers:
        raise PlanError(f"plan.trainable: {text!r} matches no layer; the model has layers 0..{num_layers - 1}")
    return layers


def _by_index(index: int, num_layers: int) -> list[int]:
    if not -num_layers <= index < num_layers:
        raise PlanError(
            f"plan.trainable: layer {index} does not exist; the nearest is {0 if index < 0 else num_layers - 1}"
        )
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


def _by_pattern(pattern: str, num_layers: int, text: str) -> list[int]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise PlanError(f"plan.trainable: {text!r} is not a regular expression ({error})") from None
    return [layer for layer in range(num_layers) if compiled.search(f"layers.{layer}.")]


def _by_metric(rest: str, profile: LayerProfile | None, text: str) -> list[int]:
    count, _, metric = rest.partition(":")
    if profile is None:
        raise PlanError(f"plan.trainable: {text!r} needs a layer profile; trace the model first")
    values = {"sensitivity": profile.layer_sensitivity, "task_particle": profile.task_particle}.get(metric)
    if values is None or not count.isdigit() or not 1 <= int(count) <= len(values):
        raise PlanError(f"plan.trainable: {text!r}: expected top:K:sensitivity or top:K:task_particle")
    return sorted(sorted(range(len(values)), key=lambda layer: (-values[layer], layer))[: int(count)])
