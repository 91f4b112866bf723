"""How many positions a model has, by its own config class: GPT-2 calls them `n_positions`, MPT `max_seq_len`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerplan.models.files import load_hf_config

NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "max_target_positions",
    "n_ctx",
)
"""`transformers` maps most onto the first (`attribute_map`); the rest are of classes that do not, and of remote code."""


def find_max_positions(name: str, *, revision: str = "main") -> int | None:
    """Tokens a model's positions can hold; None where nothing bounds them.

    Args:
        name: Folder or hub id.
        revision: Revision on the hub.

    Raises:
        ModelError: When the config is missing or malformed.
    """
    return read_max_positions(load_hf_config(name, revision=revision))


def read_max_positions(config: Mapping[str, Any]) -> int | None:
    """The same out of the content of `config.json`."""
    return positions_of(_as_class(config))


def positions_of(config: Any) -> int | None:
    """The same of a config's class, its text part: recurrent models and ALiBi have no bound."""
    if _uses_alibi(config):
        return None
    values = (_read(config, name) for name in NAMES)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _as_class(config: Mapping[str, Any]) -> Any:
    """The text part as its class, with the class's defaults; what `transformers` does not know stays a mapping."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).get_text_config()
    except Exception:  # an unknown type, or values its class refuses: loading the model says which
        return {**config, **(config.get("text_config") or {})}


def _uses_alibi(config: Any) -> bool:
    return _read(config, "alibi") is True or _read(_read(config, "attn_config"), "alibi") is True


def _read(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
