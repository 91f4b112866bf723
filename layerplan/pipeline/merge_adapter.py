"""An adapter merged into its base on request: a model folder that `transformers` and vLLM open."""

from __future__ import annotations

from pathlib import Path

from layerplan.errors import ModelError
from layerplan.models.ref import ModelRef


def merge_adapter(adapter: Path, base: ModelRef, out_dir: Path) -> None:
    """Writes the base's own files with what the adapter changes of them.

    Args:
        adapter: Folder in PEFT's format.
        base: The model it belongs to.
        out_dir: Folder that is made.

    Raises:
        ModelError: When the folder is no adapter, one for another base or one that cannot be merged, or `out_dir` exists.
    """
    from layerplan.aside import writing_folder_aside
    from layerplan.checkpoint.export_weights import sort_base_weights, write_weights
    from layerplan.checkpoint.hf_export import copy_companions
    from layerplan.models.adapters import check_adapter, compute_merged, read_adapter
    from layerplan.models.written_tokenizer import name_plain_class

    if out_dir.exists():
        raise ModelError(f"{out_dir}: exists already; name a folder that does not")
    check_adapter(adapter, base)
    skeleton = base.skeleton()
    model = skeleton.model
    merged = compute_merged(read_adapter(adapter, base), model, skeleton.reader.read)
    source = base.folder(with_weights=True)
    weights = sort_base_weights(model, source, set(merged), as_float32=False)
    with writing_folder_aside(out_dir) as folder:
        write_weights(weights, model, merged.__getitem__, folder)
        copy_companions(source, folder)
        name_plain_class(folder)
