"""The report's table of the scores of checkpoints by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerplan.report.html_parts import render_table
from layerplan.run_folder import BASE, HELD_OUT_NAME, list_scored_steps


def render_checkpoint_scores(evaluation: Path) -> str:
    """A row per scored model, the base first: accuracies with their counts, bits per byte; empty below three models."""
    labels = list_scored(evaluation)
    if len(labels) < 3:
        return ""
    scores = {label: _read_accuracies(evaluation / label) for label in labels}
    columns = list(dict.fromkeys(name for values in scores.values() for name in values))
    rows = [[label, *(scores[label].get(name, "–") for name in columns)] for label in labels]
    return "<h2>Scores during training</h2>" + render_table(["model", *columns], rows)


def list_scored(evaluation: Path) -> list[str]:
    """Names of the scored models: the base, then checkpoints by step."""
    base = [BASE] if (evaluation / BASE).is_dir() else []
    return base + list_scored_steps(evaluation)


def _read_accuracies(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        for key, result in _read_json(path).items():
            found[key] = f"{result['question_mean']:.1f} ({result['num_correct']:,} of {result['num_asked']:,})"
    for path in sorted((folder / HELD_OUT_NAME).glob("*.json")):
        found[f"{path.stem}, bits per byte"] = f"{_read_json(path)['bits_per_byte']:.4f}"
    return found


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
