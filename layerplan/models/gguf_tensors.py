"""The weights of a GGUF file, one after another, as `transformers` names and lays them out.

`transformers` has what undoes llama.cpp's conversion: which GGUF tensor becomes which parameter, and which were permuted,
shifted or merged. Its own loading of GGUF files wants `accelerate`, and holds the whole model; these are the same parts
driven one tensor at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerplan.errors import ModelError, first_line
from layerplan.models.gguf_file import GgufFile
from layerplan.models.gguf_positions import READ_HERE, read_rotary_share, read_scaling

LEFT_OUT = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""GGUF's keys that not every architecture of `transformers`' table has, and the names of its configs."""
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models: their scores are scaled by the width of a layer per head, which llama.cpp knows by the count of
layers alone and no file says."""
RECOMPUTED = ("attn_rot_embd", "attn_rot_embd.weight")
"""Tensors of old files that only repeat what follows from the config: the frequencies of positions."""


@dataclass(frozen=True)
class GgufFacts:
    """What the file's metadata say of the model."""

    values: dict[str, Any]
    """Under the names that `transformers` gives them."""
    config: Any
    """The same as a config of the model's class."""


def read_facts(file: GgufFile) -> GgufFacts:
    """The model's config as `transformers` reads it from the metadata.

    Raises:
        ModelError: When `transformers` does not read the architecture, or the metadata lack what it needs.
    """
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, get_gguf_config, read_gguf_metadata
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, load_gguf_checkpoint
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if file.architecture in GGUF_CONFIG_ARCHS:
            values = get_gguf_config(*read_gguf_metadata(str(file.path)))
        else:
            values = load_gguf_checkpoint(str(file.path))["config"]
            values |= _read_left_out(file, values)
            values |= read_scaling(file, values)
        return GgufFacts(values, CONFIG_MAPPING[values["model_type"]].from_dict(dict(values)))
    except ModelError:
        raise
    except Exception as error:  # a library's code over data of any shape
        if "not supported" in str(error):
            known = sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"})
            raise ModelError(
                f"model.name={file.path}: transformers reads no GGUF file of architecture {file.architecture!r};"
                f" it reads {', '.join(known)}. Take the model's safetensors instead"
            ) from None
        raise ModelError(
            f"model.name={file.path}: transformers cannot make a config of its metadata ({first_line(error)})"
        ) from None


def _read_left_out(file: GgufFile, values: dict[str, Any]) -> dict[str, Any]:
    """What the file states and `transformers` leaves at its class's defaults, those of one published model."""
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    read, own = GGUF_CONFIG_MAPPING.get(values["model_type"], {}), CONFIG_MAPPING[values["model_type"]]()
    stated = {
        name: file.reader.fields.get(f"{file.architecture}.{key}") for key, name in LEFT_OUT.items() if key not in read
    }
    found = {name: value.contents() for name, value in stated.items() if value is not None and hasattr(own, name)}
    if LARGEST_GEMMA.get(file.architecture, 0) == values.get("num_hidden_layers"):
        found["query_pre_attn_scalar"] = values["hidden_size"] // values["num_attention_heads"]
    return found | read_rotary_share(file, values | found, getattr(own, "rope_parameters", None) or {})


def iter_tensors(
    file: GgufFile, facts: GgufFacts, model: nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yields (the model's name, values) of every parameter the file has, each as soon as its parts are there.

    At most the tensor at hand is held, in float32 and in `dtype`, and of experts those of one layer.

    Args:
        file: The file.
        facts: From `read_facts`.
        model: The model on the meta device.
        dtype: Dtype of the values.

    Raises:
        ModelError: When a tensor cannot be de-quantised or laid out.
    """
    from transformers.integrations.gguf import is_gguf_arch_supported

    whole = is_gguf_arch_supported(file.architecture)
    try:
        yield from _load_whole(file, model, dtype) if whole else _iter_parts(file, facts, model, dtype)
    except (ValueError, KeyError, IndexError, RuntimeError, NotImplementedError, TypeError) as error:
        raise ModelError(f"model.name={file.path}: its tensors cannot be laid out ({first_line(error)})") from None


def _iter_parts(file: GgufFile, facts: GgufFacts, model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=facts.values)
    names = get_gguf_hf_weights_map(_Names(model), processor, model_type=file.architecture)
    left = Counter(filter(None, (_find_target(tensor.name, names) for tensor in file.reader.tensors)))
    ready: dict[str, Tensor] = {}
    for tensor in file.reader.tensors:
        values, known = dequantize(tensor.data, tensor.tensor_type), len(ready)
        done = processor.process(
            weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": ready}
        )
        if done.name in names:
            ready[names[done.name]] = torch.from_numpy(np.require(done.weights, requirements=["C", "W"]))
        target = _find_target(tensor.name, names)
        if target is None and len(ready) == known and done.name not in names:
            _refuse_unplaced(file, tensor.name, model)
        left.subtract([target] if target else [])
        for name in [name for name in ready if left[name] <= 0]:
            yield name, ready.pop(name).to(dtype)


def _refuse_unplaced(file: GgufFile, name: str, model: nn.Module) -> None:
    """Refuses a tensor that the model has no place for: biases or a norm that the file's own program would compute with."""
    if name not in READ_HERE and not name.endswith(RECOMPUTED):
        raise ModelError(
            f"model.name={file.path}: its tensor {name} has no place in a {type(model).__name__} as transformers makes it of"
            " the file, which would compute other logits; take the model's safetensors instead"
        )


class _Names:
    """What the mapping of names asks a model for, of the model and its direct children alone.

    A file's names begin at the model or at its trunk; asking every module of every layer costs half a minute.
    """

    def __init__(self, module: nn.Module, *, has_children: bool = True) -> None:
        self._module, self._has_children = module, has_children
        self.config = getattr(module, "config", None)

    def state_dict(self) -> dict[str, Tensor]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _Names]]:
        children = self._module.named_children() if self._has_children else ()
        return [(name, _Names(child, has_children=False)) for name, child in children]


def _find_target(stored: str, names: dict[str, str]) -> str | None:
    """The parameter a GGUF tensor goes into; experts are mapped without their `.weight`."""
    return names.get(stored, names.get(stored.removesuffix(".weight")))


def _load_whole(file: GgufFile, model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """For architectures that `transformers` reads by its newer conversions, which fill a model at once."""
    from transformers import GgufConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    quantizer = GgufHfQuantizer(GgufConfig(gguf_file=str(file.path), dequantize=True))
    quantizer.read_header(str(file.path))
    quantizer.update_dtype(dtype)
    quantizer._process_model_before_weight_loading(model)
    mapping = get_model_conversion_mapping(model, None, quantizer)
    options = LoadStateDictConfig(dtype=dtype, hf_quantizer=quantizer, weight_mapping=mapping)
    convert_and_load_state_dict_in_model(model, quantizer.get_state_dict(str(file.path), model), options)
    yield from ((name, value) for name, value in model.state_dict().items() if not value.is_meta)
