"""Where checkpoints lie, and the small JSON files in them."""

from __future__ import annotations

import json
from typing import Any

from layerplan.artifacts import render_json
from layerplan.errors import CheckpointError
from layerplan.run_folder import STATE_NAME
from layerplan.storage.paths import StoredPath, write_whole

METADATA_NAME = ".metadata"
"""PyTorch's own record of a distributed checkpoint."""
FORMAT = 1
"""Of checkpoints that end with a seal; a state file without a number is from before there were seals."""
_FORMAT_KEY = "checkpoint_format"


def read_train_state(checkpoint: StoredPath) -> dict[str, Any]:
    """Reads the state of a checkpoint; whether the files beside it belong to it is the seal's matter.

    Raises:
        CheckpointError: When the checkpoint is incomplete or its state unreadable.
    """
    state = _read_state(checkpoint)
    state.pop(_FORMAT_KEY, None)
    return state


def promises_seal(checkpoint: StoredPath) -> bool:
    """Whether the state was written by a version that seals, so that a checkpoint without a seal is unfinished.

    Raises:
        CheckpointError: When there is no readable state.
    """
    return _FORMAT_KEY in _read_state(checkpoint)


def write_train_state(checkpoint: StoredPath, state: dict[str, Any]) -> bytes:
    """Writes the state atomically, after the shards and before the seal; returns its bytes."""
    return write_json(checkpoint / STATE_NAME, {_FORMAT_KEY: FORMAT, **state})


def _read_state(checkpoint: StoredPath) -> dict[str, Any]:
    try:
        return read_json(checkpoint / STATE_NAME)
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: no {STATE_NAME}; the checkpoint is incomplete") from None


def read_json(path: StoredPath) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: When there is no such file.
        CheckpointError: When it is anything else than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: an object is expected, not a {type(values).__name__}")
    return values


def write_json(path: StoredPath, values: dict[str, Any]) -> bytes:
    """Writes an object to the disk itself, then moves it into place; returns its bytes."""
    content = render_json(values).encode()
    write_whole(path, content)
    return content
