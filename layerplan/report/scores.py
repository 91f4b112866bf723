"""The report's sections on scores: checkpoints by step, held-out text, and prompts continued side by side."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from layerplan.report.html_parts import render_table

BASE = "base"


def render_checkpoint_scores(evaluation: Path) -> str:
    """A row per scored model, the base first: accuracies with their counts, bits per byte; empty below three models."""
    labels = list_scored(evaluation)
    if len(labels) < 3:
        return ""
    scores = {label: _read_accuracies(evaluation / label) for label in labels}
    columns = list(dict.fromkeys(name for values in scores.values() for name in values))
    rows = [[label, *(scores[label].get(name, "–") for name in columns)] for label in labels]
    return "<h2>Scores during training</h2>" + render_table(["model", *columns], rows)


def render_held_out(evaluation: Path) -> str:
    """One sentence per held-out text."""
    path = evaluation / "held_out_verdicts.json"
    if not path.exists():
        return ""
    verdicts = json.loads(path.read_text(encoding="utf-8"))
    return "<h2>Held-out text</h2>" + "".join(
        f'<p class="verdict">{html.escape(item["name"] + ": " + item["sentence"])}</p>' for item in verdicts
    )


def render_continuations(evaluation: Path) -> str:
    """The case studies (Tables 11 and 12): prompts continued greedily by the base and by the newest checkpoint."""
    found = {label: _read_continuations(evaluation / label) for label in list_scored(evaluation)}
    labels = [label for label, texts in found.items() if texts]
    if not labels:
        return ""
    shown = labels if len(labels) == 1 else [labels[0], labels[-1]]
    prompts = list(dict.fromkeys(prompt for label in shown for prompt in found[label]))
    rows = [[prompt, *(found[label].get(prompt, "–") for label in shown)] for prompt in prompts]
    return "<h2>Case studies</h2>" + render_table(["prompt", *shown], rows, style="cases")


def list_scored(evaluation: Path) -> list[str]:
    """Names of the scored models: the base, then checkpoints by step."""
    base = [BASE] if (evaluation / BASE).is_dir() else []
    return base + sorted(path.name for path in evaluation.glob("step_*") if any(path.glob("*.json")))


def _read_accuracies(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        for key, result in _read_json(path).items():
            found[key] = f"{result['question_mean']:.1f} ({result['num_correct']:,} of {result['num_asked']:,})"
    for path in sorted((folder / "held_out").glob("*.json")):
        found[f"{path.stem}, bits per byte"] = f"{_read_json(path)['bits_per_byte']:.4f}"
    return found


def _read_continuations(folder: Path) -> dict[str, str]:
    path = folder / "continuations.jsonl"
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return {record["prompt"]: record["text"] for record in records}


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
