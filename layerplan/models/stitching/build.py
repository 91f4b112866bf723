"""Writes a stitched model's folder: donors' bytes, new layers' values, config, tokenizer and report, and looks at it once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerplan.errors import ModelError
from layerplan.models.base_check import DTYPES, check_base_model
from layerplan.models.files import list_companions
from layerplan.models.meta import build_without_memory
from layerplan.models.ref import ModelRef
from layerplan.models.stitching.new_layers import describe_values, iter_new_tensors
from layerplan.models.stitching.projections import find_output_projections
from layerplan.models.stitching.recipe import Recipe
from layerplan.models.stitching.seam import compare_sides, draw_sample, measure_residuals
from layerplan.models.stitching.tensors import DonorTensors, Placed, open_donor, place_tensors
from layerplan.models.weight_shards import write_shards
from layerplan.plan.stitch_report import StitchReport, TensorOrigin
from layerplan.run_folder import STITCH_NAME

SHARD_BYTES = 4 << 30
_OWN_NAMES = {"config.json", STITCH_NAME}


def write_stitched(recipe: Recipe, out_dir: Path, *, seed: int) -> StitchReport:
    """Writes the model into an empty folder.

    Raises:
        ModelError: When donors' files do not fit together, a copied layer cannot be made without effect, or what was
            written is no base.
    """
    donors = {name: open_donor(recipe.donors[name]) for name in _list_used(recipe)}
    folder = recipe.donors[recipe.embeddings].ref.folder()
    for path in list_companions(folder):
        if path.name not in _OWN_NAMES:
            (out_dir / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, out_dir / path)
    _write_config(recipe, out_dir)
    loaded = {name: recipe.donors[name].ref.load() for name in _list_used(recipe)}
    zeros = _find_zeros(recipe, donors, loaded)
    origins: list[TensorOrigin] = []
    write_shards(_iter_tensors(recipe, donors, zeros, origins, seed), out_dir, shard_bytes=SHARD_BYTES)
    made = ModelRef(str(out_dir), trust_remote_code=recipe.trust_remote_code)
    check_base_model(made.name, trust_remote_code=made.trust_remote_code)
    report = StitchReport(
        donors={name: recipe.donors[name].ref.identity() for name in donors},
        layers=recipe.layers,
        tensors=tuple(origins),
        seed=seed,
        **_look(recipe, made, loaded),
    )
    report.save(out_dir / STITCH_NAME)
    return report


def _list_used(recipe: Recipe) -> list[str]:
    ends = (recipe.embeddings, recipe.final_norm, recipe.lm_head)
    return [name for name in recipe.donors if name in ends or any(layer.donor == name for layer in recipe.layers)]


def _write_config(recipe: Recipe, out_dir: Path) -> None:
    (out_dir / "config.json").write_text(json.dumps(recipe.config, indent=2) + "\n", encoding="utf-8")


def _find_zeros(
    recipe: Recipe, donors: dict[str, DonorTensors], loaded: dict[str, Any]
) -> dict[tuple[str, int], frozenset[str]]:
    """Stored tensors of each copied donor layer that become zero in the copy."""
    zeros = {}
    for layer in recipe.layers:
        if not layer.is_copy or layer.donor is None or layer.donor_layer is None:
            continue
        donor = donors[layer.donor]
        prefix = f"{donor.parts.layers_path}.{layer.donor_layer}."
        names = {prefix + name for name in find_output_projections(loaded[layer.donor], layer.donor_layer)}
        feeds = {tensor for tensor, owners in donor.placed.owners.items() if names & set(owners)}
        for tensor in feeds:
            if not set(donor.placed.owners[tensor]) <= names:
                raise ModelError(
                    f"{tensor}: holds an output projection and more, so that a copy of it cannot be zero alone"
                )
        zeros[layer.donor, layer.donor_layer] = frozenset(feeds)
    return zeros


def _iter_tensors(
    recipe: Recipe,
    donors: dict[str, DonorTensors],
    zeros: dict[tuple[str, int], frozenset[str]],
    origins: list[TensorOrigin],
    seed: int,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its value, noting where it is from."""
    dtype = torch.float32
    for placed in place_tensors(recipe, donors):
        dtype = DTYPES.get(placed.stored.dtype, dtype) if placed.layer is None else dtype
        value, how = _read(placed), None
        layer = None if placed.layer is None else recipe.layers[placed.layer]
        if layer is not None and layer.is_copy and placed.source in zeros[placed.donor, layer.donor_layer or 0]:
            value, how = torch.zeros_like(value), "all 0: an output projection of a copied layer"
        given = {} if how else {"donor": placed.donor, "donor_tensor": placed.source}
        origins.append(TensorOrigin(name=placed.name, initialised=how, **given))
        yield placed.name, value
    model = _build_meta(recipe)
    for index, layer in enumerate(recipe.layers):
        if layer.donor is None:
            for name, value in iter_new_tensors(model, index, seed=seed, dtype=dtype):
                origins.append(TensorOrigin(name=name, initialised=describe_values(value)))
                yield name, value


def _build_meta(recipe: Recipe) -> Any:
    """The model on the meta device; only a hybrid has layers of its own to be made."""
    from layerplan.models.hybrid import HybridConfig

    if all(layer.donor is not None for layer in recipe.layers):
        return None
    return build_without_memory(HybridConfig.from_dict(recipe.config), name="stitched")


def _read(placed: Placed) -> Tensor:
    from safetensors import safe_open

    with safe_open(placed.stored.file, framework="pt") as handle:
        value: Tensor = handle.get_tensor(placed.source)
    return value


def _look(recipe: Recipe, made: ModelRef, loaded: dict[str, Any]) -> dict[str, Any]:
    """Runs donors and result on one sample: both sides of every seam, and whether the logits stayed the donor's."""
    refs = [made, *(recipe.donors[name].ref for name in loaded)]
    sample = draw_sample(min(ref.shape().vocab_size for ref in refs))
    expected, logits = {}, {}
    for name in list(loaded):
        expected[name], logits[name] = measure_residuals(loaded.pop(name), sample)
    arriving, found = measure_residuals(made.load(), sample)
    keeps = torch.equal(found, logits[recipe.embeddings]) if recipe.is_expansion else None
    if keeps is False:
        raise ModelError(
            f"model.expand: the logits of the expanded {recipe.config['model_type']} differ from its donor's by up to"
            f" {float((found - logits[recipe.embeddings]).abs().max()):.3g}, though every copied layer hands on what it is given;"
            " the family reads its layers' positions, and cannot be expanded"
        )
    return {"seams": compare_sides(recipe.layers, arriving, expected), "keeps_logits": keeps}
