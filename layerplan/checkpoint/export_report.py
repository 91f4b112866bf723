"""What an export showed, as a value: written beside the run, and read by the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from layerplan.artifacts import write_json


@dataclass(frozen=True)
class ExportReport:
    """What the export proved; that the reloaded model computes what the trained one does goes without a number."""

    folder: Path
    num_frozen: int
    """Parameters the plan freezes; in the files each has the base's dtype and bytes."""
    num_trained: int
    """Parameters the plan trains; each has the checkpoint's values, rounded to `trained_dtypes`."""
    num_trained_changed: int
    """Trained parameters that differ from the base as they are exported."""
    trained_dtypes: tuple[str, ...]
    """Dtypes of the trained tensors in the files."""
    logits_moved_by_rounding: float
    """Largest difference of a logit that rounding to those dtypes made, relative to the largest logit; 0 for float32."""
    export_dtype: str = "base"
    """What `train.export_dtype` asked for."""
    replaced_class: str | None = None
    """Class of the base's tokenizer in transformers, which splits text otherwise than its file; None where it stays."""

    def save(self, path: Path) -> None:
        """Writes the proof as JSON, atomically."""
        values = {
            "frozen_tensors_identical_to_base": self.num_frozen,
            "trained_tensors": self.num_trained,
            "trained_tensors_changed": self.num_trained_changed,
            "trained_tensors_dtype": ", ".join(self.trained_dtypes),
            "logits_moved_by_rounding": self.logits_moved_by_rounding,
            "export_dtype": self.export_dtype,
        }
        write_json(path, values)


def is_exported_as(path: Path, export_dtype: str) -> bool:
    """Whether the export that a report is of has what `train.export_dtype` asks for now.

    Reports of versions that did not note it are of `base` or, where all that trained is float32, of both.
    """
    if not path.exists():
        return True
    found = json.loads(path.read_text(encoding="utf-8"))
    if "export_dtype" not in found and found.get("trained_tensors_dtype") == "float32":
        return True
    return bool(found.get("export_dtype", "base") == export_dtype)
