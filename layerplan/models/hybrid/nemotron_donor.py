"""What a NemotronH model gives a hybrid: its Mamba2 blocks, each with the feed-forward block behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import NemotronHConfig

from layerplan.models.hybrid.nemotron import SIZES

PARTS = ("mixer_block", "feed_forward_block")
"""Where the two blocks of a pair go in a Nemotron layer."""
TYPES = ("linear_attention", "mlp")
"""transformers' names of their types."""


def check_pair(config: Mapping[str, Any], block: int) -> None:
    """Raises `ValueError` naming the block that keeps those at an index and behind it from being a pair."""
    types = _read(config).layers_block_type
    for at, wanted in zip((block, block + 1), TYPES):
        found = f"a block of type {types[at]}" if at < len(types) else "no block"
        if found != f"a block of type {wanted}":
            raise ValueError(
                f"block {at} is {found}, where a Nemotron layer has {wanted}; it is a linear_attention block and the mlp"
                " block behind it"
            )


def read_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of its Mamba2 and feed-forward blocks, by the names of `SIZES`."""
    given = _read(config)
    return {name: type(value)(getattr(given, name)) for name, value in SIZES.items()}


def _read(config: Mapping[str, Any]) -> Any:
    """The file's values by its class; a limit that no block reads is left out, for a file may have its infinity in words."""
    return NemotronHConfig.from_dict({name: value for name, value in config.items() if name != "time_step_limit"})
