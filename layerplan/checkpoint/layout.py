"""Where checkpoints lie, and which of them are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerplan.errors import CheckpointError

STATE_NAME = "train_state.json"
CHECKPOINTS_NAME = "checkpoints"


def name_step(step: int) -> str:
    """Folder name of a step: `step_00001000`."""
    return f"step_{step:08d}"


def read_train_state(checkpoint: Path) -> dict[str, Any]:
    """Reads the state written last into a checkpoint.

    Raises:
        CheckpointError: When the checkpoint is incomplete or its state unreadable.
    """
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: no {STATE_NAME}; the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}/{STATE_NAME}: cannot be read ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{checkpoint}/{STATE_NAME}: an object is expected")
    return state


def write_train_state(checkpoint: Path, state: dict[str, Any]) -> None:
    """Writes the state atomically; its presence marks the checkpoint as complete."""
    partial = checkpoint / (STATE_NAME + ".partial")
    partial.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    partial.replace(checkpoint / STATE_NAME)
