"""A study's finished part as one small file, `benchmarks/results/studies/<name>.json.gz`, to go on from on another machine.

It holds the arms, the base's losses, what the rivals measured and the hashes of the inputs; no text and no weights. Folders
of this machine stand in it by the variables that name them.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from layerplan.artifacts import write_json
from layerplan.plan.layer_measurement import LayerMeasurements
from layerplan.run_folder import MEASUREMENTS_NAME

PACKED = Path(__file__).parent / "results" / "studies"
VARIABLES = ("LAYERPLAN_DATA", "LAYERPLAN_SMOLLM2", "LAYERPLAN_STUDY_BASE")


def pack(folder: Path) -> Path:
    """Writes the file of a study's folder, and returns its path."""
    kept: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        if name in ("inputs.json", "base.json", f"measured/{MEASUREMENTS_NAME}") or name.startswith("arms/"):
            content = hide_folders(json.loads(path.read_text(encoding="utf-8")))
            if name.startswith("arms/"):
                content["machine"].pop("command", None)
            kept[name] = content
    file = PACKED / f"{folder.name}.json.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(json.dumps(kept, sort_keys=True).encode(), mtime=0))
    return file


def unpack(folder: Path) -> None:
    """Writes those files of a study's folder that are not there, when it was packed."""
    file = PACKED / f"{folder.name}.json.gz"
    if not file.exists():
        return
    for name, content in json.loads(gzip.decompress(file.read_bytes())).items():
        path = folder / name
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == MEASUREMENTS_NAME:
            LayerMeasurements.model_validate(content).save(path)  # sealed anew: a folder's name changed
        else:
            write_json(path, content)


def hide_folders(value: Any) -> Any:
    """The value with the folders that environment variables name replaced by these."""
    text = json.dumps(value)
    for name in VARIABLES:
        folder = os.environ.get(name)
        text = text.replace(json.dumps(folder)[1:-1], f"${name}") if folder else text
    return json.loads(text)
