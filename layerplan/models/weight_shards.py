"""Safetensors written as their tensors come, so that memory holds one shard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerplan.models.weight_files import INDEX_NAME, WEIGHTS_NAME


def write_shards(tensors: Iterable[tuple[str, Any]], out_dir: Path, *, shard_bytes: int) -> None:
    """Writes tensors as they come: one `model.safetensors`, or shards of about `shard_bytes` with their index."""
    parts: list[tuple[Path, list[str]]] = []
    held: dict[str, Any] = {}
    total = size = 0
    for name, value in tensors:
        if held and size + value.nbytes > shard_bytes:
            parts.append(_write_part(held, out_dir, len(parts)))
            held, size = {}, 0
        held[name] = value.contiguous()
        size += value.nbytes
        total += value.nbytes
    parts.append(_write_part(held, out_dir, len(parts)))
    if len(parts) == 1:
        parts[0][0].replace(out_dir / WEIGHTS_NAME)
        return
    places: dict[str, str] = {}
    for number, (part, names) in enumerate(parts, start=1):
        final = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.replace(out_dir / final)
        places |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out_dir / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_part(tensors: dict[str, Any], out_dir: Path, number: int) -> tuple[Path, list[str]]:
    from safetensors.torch import save_file

    path = out_dir / f"part-{number:05d}"
    save_file(tensors, path, metadata={"format": "pt"})
    return path, list(tensors)
