"""What a part of a decoder layer is called."""

from __future__ import annotations

import re

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def name_module(parameter: str) -> str:
    """Name of the module that a parameter belongs to, by its name inside the layer.

    `weight` and `bias` are left out and places in lists are `*`, as in `mlp.down_proj` and `mlp.experts.*.w1`: all experts
    of a layer's list are one module.
    """
    return _INDEX.sub("*", re.sub(r"\.(weight|bias)$", "", parameter))
