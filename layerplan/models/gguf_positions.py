"""How a GGUF file stretches rotary positions, which `transformers` leaves out of the config it makes of most files.

llama.cpp's converter writes linear and YaRN scaling as metadata, and what divides each frequency as tensors: Llama 3.1 and later
have `rope_freqs.weight`, Phi-3's long versions `rope_factors_long.weight` and `rope_factors_short.weight`. A model without
them computes other logits at every position but the first. What cannot be said in a config is refused.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from layerplan.errors import ModelError
from layerplan.models.gguf_file import GgufFile

FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
READ_HERE = (FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that become values of the config."""
SAID_BY_CLASS = ("gemma4_text",)
"""Models of which every size has the same positions, those of the class; their `rope_freqs.weight` repeats them."""
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _ORIGINAL: 8192}
"""What all of Meta's models from Llama 3.1 on have (their config.json); a file keeps the factors they lead to."""
_UNDERSTOOD = {"type", "factor", "scale_linear", "original_context_length", "finetuned"}


def read_scaling(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    """The config's `rope_scaling` by the file, under that name; nothing where positions are not stretched or are read already.

    Args:
        file: The file.
        values: The config as `transformers` read it.

    Raises:
        ModelError: When the file stretches positions in a way that no config of `transformers` says.
    """
    if "rope_scaling" in values or "rope_parameters" in values or values["model_type"] in SAID_BY_CLASS:
        return {}
    stored = {
        tensor.name: np.array(tensor.data, dtype=np.float64).ravel()
        for tensor in file.reader.tensors
        if tensor.name in READ_HERE
    }
    said = _read_metadata(file)
    kind, factor = said.get("type", "linear"), float(said.get("factor", said.get("scale_linear", 0.0)) or 1.0)
    if LONG_FACTORS in stored or SHORT_FACTORS in stored:
        scaling = _read_longrope(file, stored, said)
    elif FREQUENCY_FACTORS in stored and not np.all(stored[FREQUENCY_FACTORS] == 1.0):
        if factor != 1.0:
            raise _refuse(file, f"has both {FREQUENCY_FACTORS} and rope.scaling.factor={factor:g}")
        scaling = _find_llama3(file, stored[FREQUENCY_FACTORS], float(values.get("rope_theta", 10_000.0)))
    elif kind == "none" or factor == 1.0:
        return {}
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and "original_context_length" in said:
        scaling = {"rope_type": "yarn", "factor": factor}
        scaling[_ORIGINAL] = int(said["original_context_length"])
    else:
        raise _refuse(file, f"has rope.scaling.type={kind!r} with {', '.join(sorted(said))}")
    read = _UNDERSTOOD | ({"attn_factor"} if scaling["rope_type"] == "longrope" else set())
    if strange := sorted(name for name, value in said.items() if name not in read and value != 1.0):
        raise _refuse(file, f"has rope.scaling.{strange[0]}={said[strange[0]]!r}")
    # Phi-3's class has a field of its own for it, which goes before the one among the others
    apart = {_ORIGINAL: scaling[_ORIGINAL]} if scaling["rope_type"] == "longrope" else {}
    return {"rope_scaling": scaling, **apart}


def read_rotary_share(file: GgufFile, values: dict[str, Any], own: dict[str, Any]) -> dict[str, float]:
    """The share of a head that is rotated, where the class knows one and the file states how much of a head it is.

    Args:
        file: The file.
        values: The config as `transformers` read it.
        own: The class's own `rope_parameters`.
    """
    field = file.reader.fields.get(f"{file.architecture}.rope.dimension_count")
    if field is None or "partial_rotary_factor" not in own:
        return {}
    width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return {"partial_rotary_factor": int(field.contents()) / width}


def _read_metadata(file: GgufFile) -> dict[str, Any]:
    before, old = f"{file.architecture}.rope.scaling.", f"{file.architecture}.rope.scale_linear"
    fields = file.reader.fields.items()
    said = {name.removeprefix(before): field.contents() for name, field in fields if name.startswith(before)}
    return said | ({"scale_linear": file.reader.fields[old].contents()} if old in file.reader.fields else {})


def _read_longrope(file: GgufFile, stored: dict[str, np.ndarray], said: dict[str, Any]) -> dict[str, Any]:
    if len(stored) != 2 or "original_context_length" not in said:
        raise _refuse(
            file, f"has {' and '.join(stored)} without what belongs to it, rope.scaling.original_context_length"
        )
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": stored[LONG_FACTORS].tolist(),
        "short_factor": stored[SHORT_FACTORS].tolist(),
        _ORIGINAL: int(said["original_context_length"]),
    }
    return scaling | ({"attention_factor": float(said["attn_factor"])} if "attn_factor" in said else {})


def _find_llama3(file: GgufFile, divisors: np.ndarray, theta: float) -> dict[str, Any]:
    """The factor that leads to these divisors by Llama 3's rule, which are 1 for the fastest and the factor for the slowest."""
    factor, low, high = round(float(divisors.max()), 4), _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    share = np.clip((_LLAMA3[_ORIGINAL] / wavelengths - low) / (high - low), 0.0, 1.0)
    if not np.allclose(1 / ((1 - share) / factor + share), divisors, rtol=1e-4):
        raise _refuse(file, f"has {FREQUENCY_FACTORS} of its own, which are not Llama 3's for any factor")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _refuse(file: GgufFile, found: str) -> ModelError:
    return ModelError(
        f"model.name={file.path}: {found}: how its positions are stretched cannot be said in a config; take the model's"
        " safetensors instead"
    )
