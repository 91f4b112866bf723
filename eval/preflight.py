"""What can be known to fail before an engine starts, each as one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerplan.errors import EvaluationError
from layerplan.models.ref import ModelRef
from layerplan.models.weight_files import read_stored_tensors


def check_model_files(model: ModelRef) -> None:
    """Refuses a model whose own code is not allowed, and a folder whose weights were not written to the end.

    Raises:
        ModelError: Naming the code, or the file that is missing or shorter than its own header says.
    """
    model.check_consent()
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        read_stored_tensors(folder)


def check_lengths(model: ModelRef, lengths: Sequence[int], names: Sequence[str]) -> None:
    """Refuses a model whose positions cannot hold a prompt and its answer.

    Args:
        model: Whose positions.
        lengths: Tokens of each prompt with its answer.
        names: What each prompt is called.

    Raises:
        EvaluationError: Naming the longest prompt.
    """
    limit = model.max_positions()
    if limit is None or not lengths:
        return
    longest = max(range(len(lengths)), key=lambda index: lengths[index])
    if lengths[longest] > limit:
        too_long = sum(length > limit for length in lengths)
        raise EvaluationError(
            f"{model}: question {names[longest]} needs {lengths[longest]} tokens with its answer, the model has"
            f" {limit} positions; {too_long} of {len(lengths)} prompts do not fit"
        )
