"""What can be known to fail before an engine starts, each as one line."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from layerplan.errors import EvaluationError, ModelError
from layerplan.models.positions import find_max_positions

HEADER_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""A safetensors header larger than this is no header (the format's own limit)."""


def check_weight_files(model: str) -> None:
    """Refuses a model folder whose weights were not written to the end; hub ids are left to the hub.

    Raises:
        ModelError: Naming the file that is missing or shorter than its own header says.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return
    files = {path.name for path in folder.glob("*.safetensors")}
    if not files:
        raise ModelError(f"model {model}: the folder has no *.safetensors weights; it is not a whole checkpoint")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"model {model}: {index.name} cannot be read ({error})") from None
        if wanted - files:
            raise ModelError(f"model {model}: {', '.join(sorted(wanted - files))} is missing; half-written?")
    for name in sorted(files):
        _check_length(folder / name)


def check_lengths(model: str, revision: str, lengths: Sequence[int], names: Sequence[str]) -> None:
    """Refuses a model whose positions cannot hold a prompt and its answer.

    Args:
        model: Folder or hub id.
        revision: Revision on the hub.
        lengths: Tokens of each prompt with its answer.
        names: What each prompt is called.

    Raises:
        EvaluationError: Naming the longest prompt.
    """
    limit = find_max_positions(model, revision=revision)
    if limit is None or not lengths:
        return
    longest = max(range(len(lengths)), key=lambda index: lengths[index])
    if lengths[longest] > limit:
        too_long = sum(length > limit for length in lengths)
        raise EvaluationError(
            f"{model}: question {names[longest]} needs {lengths[longest]} tokens with its answer, the model has"
            f" {limit} positions; {too_long} of {len(lengths)} prompts do not fit"
        )


def _check_length(path: Path) -> None:
    """A safetensors file is 8 bytes of header length, the header, and the bytes the header promises."""
    size = path.stat().st_size
    try:
        with path.open("rb") as handle:
            (header_bytes,) = struct.unpack("<Q", handle.read(HEADER_BYTES))
            if header_bytes > min(size, MAX_HEADER_BYTES):
                raise ValueError("the header is cut off")
            header = json.loads(handle.read(header_bytes))
        promised = max((item["data_offsets"][1] for key, item in header.items() if key != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"model {path.parent}: {path.name} is not a whole safetensors file ({error})") from None
    if HEADER_BYTES + header_bytes + promised != size:
        raise ModelError(
            f"model {path.parent}: {path.name} has {size:,} bytes, its header promises"
            f" {HEADER_BYTES + header_bytes + promised:,}; the checkpoint is half-written"
        )
