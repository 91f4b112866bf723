"""GGUF in, safetensors out: a folder that `transformers`, vLLM and `tokenizers` open like any other model's.

Weights are de-quantised by the `gguf` package and laid out by `transformers`, so they equal what its own GGUF reader gives,
bit for bit; `accelerate`, which that reader wants, is not needed. Tensors stream: memory holds one shard, the tensor
at hand twice in float32, and the tokenizer. Only a model whose files spell its tensors otherwise than its modules (one
matrix per expert, say) is held whole once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from layerplan.aside import making_folder
from layerplan.errors import ModelError
from layerplan.models.gguf_file import SOURCE_NAME, GgufFile, open_gguf
from layerplan.models.gguf_tokenizer import doubt_tokenizer, write_tokenizer
from layerplan.models.weight_files import INDEX_NAME
from layerplan.models.weight_shards import write_shards
from layerplan.plan.layer_profile import ModelSource

SHARD_BYTES = 1 << 30
Dtype = Literal["auto", "float32", "float16", "bfloat16"]


def convert_gguf(path: Path, out_dir: Path, *, dtype: Dtype = "auto") -> ModelSource:
    """Writes config, tokenizer, weights and `gguf_source.json` of a GGUF file to a folder of its own.

    The folder is made aside and moved into place once every tensor of the model is accounted for.

    Args:
        path: The GGUF file.
        out_dir: Folder to make; its parent may be missing.
        dtype: What the weights are written in; `auto` is the narrowest that holds every stored value exactly, which for
            quantised files is float32.

    Raises:
        ModelError: When the file cannot be read as a causal language model, or `out_dir` is there and no such folder.
    """
    if out_dir.exists():
        raise ModelError(f"{out_dir}: exists already; name another folder, or remove it")
    file = open_gguf(path)
    source = file.describe_source(note=doubt_tokenizer(file))
    with making_folder(
        out_dir
    ) as made:  # two processes may convert at once: the one that ends second throws its own away
        _write_model(file, made.parent, made, file.choose_dtype() if dtype == "auto" else dtype)
        (made / SOURCE_NAME).write_text(source.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return source


def _write_model(file: GgufFile, work: Path, out_dir: Path, dtype_name: str) -> None:
    import torch

    from layerplan.models.base_check import check_base_model
    from layerplan.models.gguf_tensors import iter_tensors, read_facts
    from layerplan.models.meta import build_without_memory

    facts = read_facts(file)
    config, model = facts.config, build_without_memory(facts.config, name=str(file.path))
    write_tokenizer(file, work / "alone", out_dir)
    config.architectures = [type(model).__name__]
    config.dtype = getattr(torch, dtype_name)
    config.__dict__.pop("_model_name_or_path", None)
    config.save_pretrained(out_dir)
    if model.can_generate():
        model.generation_config.save_pretrained(out_dir)
    write_shards(iter_tensors(file, facts, model, config.dtype), out_dir, shard_bytes=SHARD_BYTES)
    _spell_as_stored(model, out_dir)
    try:
        check_base_model(str(out_dir))
    except ModelError as error:
        raise ModelError(str(error).replace(str(out_dir), str(file.path))) from None


def _spell_as_stored(model: Any, out_dir: Path) -> None:
    """Rewrites the weights where a model's files have other tensors than its modules, as one per expert."""
    from safetensors.torch import load_file
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    if set(revert_weight_conversion(model, state)) == set(state):
        return
    written = sorted(out_dir.glob("*.safetensors"))
    for path in written:
        model.load_state_dict(load_file(path), strict=False, assign=True)
    model.tie_weights()
    for path in (*written, out_dir / INDEX_NAME):
        path.unlink(missing_ok=True)
    model.save_pretrained(out_dir, max_shard_size=SHARD_BYTES)
