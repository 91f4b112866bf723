"""Whether a model's files are a base that can be continued, asked of the files before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layerplan.errors import ModelError
from layerplan.models.files import fetch_model_folder, load_hf_config
from layerplan.models.meta import build_without_memory, explain_load_error
from layerplan.models.tensor_map import TensorAccount, account_for_tensors, map_tensors
from layerplan.models.weight_files import StoredTensor, read_stored_tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes a parameter may be stored in: plain numbers, that widen to float32 or are narrowed knowingly."""

ALL_DTYPES = DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtypes a buffer, or a tensor the model has no use for, may be stored in."""


def check_base_model(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> None:
    """Refuses what is no base model: config, kind of checkpoint, and every tensor by name, dtype and shape.

    A hub id is downloaded for it: first the small files, then the weights, which the export needs here anyway.

    Raises:
        ModelError: In one line, with what was found and the remedy.
    """
    folder = fetch_model_folder(name, revision=revision)
    refuse_adapter(name, folder)
    values = load_hf_config(name, revision=revision)
    refuse_quantized(name, values)
    refuse_code_without_consent(name, values, trust_remote_code=trust_remote_code)
    refuse_other_tasks(name, values)
    model = build_without_memory(
        load_auto_config(name, folder, trust_remote_code), name=name, trust_remote_code=trust_remote_code
    )
    folder = fetch_model_folder(name, revision=revision, with_weights=True)
    check_tensors(name, model, read_stored_tensors(folder))


def refuse_adapter(name: str, folder: Path) -> None:
    """Raises `ModelError` for a PEFT adapter, which transformers would load over a base of its own choosing."""
    path = folder / "adapter_config.json"
    if path.is_file():
        raise ModelError(
            f"model.name={name}: holds adapter_config.json, a PEFT adapter and no base model; merge it into its base"
            " (peft's `merge_and_unload`, then `save_pretrained`) and name the merged folder"
        )


def refuse_quantized(name: str, config: dict[str, Any]) -> None:
    """Raises `ModelError` for a checkpoint of quantised weights, whichever method made it."""
    for values in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = values.get("quantization_config") or values.get("compression_config")
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise ModelError(
                f"model.name={name}: config.json has a quantization_config"
                f"{f' ({method})' if method else ''}; quantised weights cannot be trained: use the unquantised"
                " checkpoint, or de-quantise it (transformers' `model.dequantize()`) and save it without that key"
            )


def refuse_code_without_consent(name: str, config: dict[str, Any], *, trust_remote_code: bool) -> None:
    """Raises `ModelError` when only code that comes with the model can build it, and the user did not allow that."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    code = _find_own_code(config)
    if code and not trust_remote_code and config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"model.name={name}: is made by Python code that comes with it ({code}), which is not run unless asked;"
            " read it, then set model.trust_remote_code: true, or give --trust-remote-code where a command takes it"
        )


def refuse_other_tasks(name: str, config: dict[str, Any]) -> None:
    """Raises `ModelError` when neither transformers nor code of the model's own has a causal LM for the config."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind, classes = config["model_type"], config.get("architectures") or []
    known = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if _find_own_code(config):
        return
    described = f"model_type {kind!r}" + (f", {classes[0]}" if classes else "")
    if kind not in known and not _is_registered(kind):
        if kind not in transformers.CONFIG_MAPPING:
            raise ModelError(f"model.name={name}: {described} is unknown to transformers {transformers.__version__}")
        raise ModelError(
            f"model.name={name}: {described} has no causal language model in transformers; a decoder-only language"
            " model is expected"
        )
    causal, trunks = (_list_classes(each) for each in (known, auto.MODEL_MAPPING_NAMES))
    if classes and hasattr(transformers, classes[0]) and not {classes[0]} & (causal | trunks):
        raise ModelError(
            f"model.name={name}: config.json says the checkpoint is a {classes[0]}, which is no causal language model;"
            " a decoder-only language model is expected"
        )


def _is_registered(kind: str) -> bool:
    """Whether a causal language model of the type was made known to transformers beside its own."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING


def check_tensors(name: str, model: Any, stored: dict[str, StoredTensor]) -> None:
    """Accounts for every stored tensor and every parameter of a model on the meta device.

    Raises:
        ModelError: For a tensor that is missing, unexpected, of another shape, or of a dtype that is no plain number;
            and for tied parameters of which the file holds two that differ.
    """
    placed = map_tensors(model, stored)
    parameters = {parameter for parameter, _ in model.named_parameters()}
    for tensor, owners in placed.owners.items():
        if stored[tensor].dtype not in DTYPES and parameters & set(owners):
            raise ModelError(
                f"model.name={name}: {tensor} is stored as {stored[tensor].dtype}; quantised weights cannot be trained:"
                " use the unquantised checkpoint, or de-quantise it"
            )
    for owner, names in placed.stored_of().items():
        if len(names) > 1 and not placed.converted & set(names):
            _refuse_untied(name, owner, [(each, stored[each]) for each in names])
    shapes = {each: (DTYPES.get(item.dtype, torch.uint8), item.shape) for each, item in stored.items()}
    refuse_unaccounted(name, model, account_for_tensors(model, shapes, placed))


def refuse_unaccounted(name: str, model: Any, account: TensorAccount) -> None:
    """Raises `ModelError` when the account has a fault."""
    fault = account.describe()
    if fault is not None:
        raise ModelError(
            f"model.name={name}: its files are not those of a {type(model).__name__} of this config.json: {fault}; copy"
            " the folder again, or mend whichever of the two is wrong"
        )


def load_auto_config(name: str, folder: Path, trust_remote_code: bool) -> Any:
    """The config of a model folder as transformers reads it; raises `ModelError` for whatever its class raises."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the code of the config's own class: anything can be raised
        raise ModelError(explain_load_error(name, error)) from None


def _refuse_untied(name: str, owner: str, tensors: list[tuple[str, StoredTensor]]) -> None:
    """Two stored tensors for one parameter are allowed when they have the same values."""
    from safetensors import safe_open

    first: torch.Tensor | None = None
    for stored_name, tensor in tensors:
        with safe_open(tensor.file, framework="pt") as handle:
            value = handle.get_tensor(stored_name)
        if first is None:
            first = value
        elif first.shape != value.shape or not torch.equal(first.double(), value.double()):
            raise ModelError(
                f"model.name={name}: config.json ties {tensors[0][0]} and {stored_name}, but {tensor.file.name} holds"
                " other values for the one than for the other; set tie_word_embeddings to false in config.json, or"
                " remove the one that is not meant"
            )


def _find_own_code(config: dict[str, Any]) -> str | None:
    """`module.Class` of the causal language model that the folder's own code defines."""
    found = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    return None if found is None else str(found)


def _list_classes(mapping: Any) -> set[str]:
    return {name for value in mapping.values() for name in (value if isinstance(value, tuple) else (value,))}
