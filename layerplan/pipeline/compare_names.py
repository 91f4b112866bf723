"""Names that tell compared runs apart, where their scores are, and what of a run is not scored yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.artifacts import load_results
from eval.held_out import load_held_out
from layerplan.errors import EvaluationError
from layerplan.run_folder import BASE, PLAN_NAME, RESULT_NAME, TRIAL_NAME, RunFolder, name_step
from layerplan.storage.working import find_home
from layerplan.train.request import load_result

UNTIL_THEN = "p values are corrected over what is there and can only grow once the rest is"


def name_runs(runs: Sequence[Path]) -> dict[Path, str]:
    """The folder's name of each run, with as many of the folders above it as tell all of them apart.

    Raises:
        EvaluationError: When a run is named twice.
    """
    for place, run in enumerate(runs):
        if run in runs[:place]:
            raise EvaluationError(f"{find_home(run)}: is named twice; a run is not compared with itself")
    for depth in range(1, 1 + max(len(run.parts) for run in runs)):
        names = ["/".join(run.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return dict(zip(runs, names, strict=True))


def check_no_sweep(run: Path) -> None:
    """Refuses a sweep and a trial of one, which are scored by losses on rows and by nothing that runs are compared by.

    Raises:
        EvaluationError: With what compares trials, and how a trial becomes a run.
    """
    folder, is_trial = RunFolder(run), (run / TRIAL_NAME).exists()
    if is_trial:
        whole, trial = run.parent.parent, str(run)
    elif folder.sweep.is_dir() and not folder.training.exists():
        whole, trial = run, f"{folder.sweep}/TRIAL"
    else:
        return
    raise EvaluationError(
        f"{find_home(run)}: is a {'trial of a sweep' if is_trial else 'sweep'}, and runs are compared; `layerplan report"
        f" {whole}` compares its trials with each other and the base. To compare a trial with a run, train its plan as a run:"
        f" `layerplan run --config {RunFolder(whole).config} --set name=NAME --set train.max_steps=STEPS"
        f" --set 'plan={{type: file, path: {trial}/{PLAN_NAME}}}'`"
    )


def find_trained_scores(run: Path) -> Path:
    """The scores of a run's last step; those of a step on the way are no result of the run.

    Raises:
        EvaluationError: When the run has not finished, or its result was not scored.
    """
    result = load_result(run)
    if result is None:
        raise EvaluationError(f"{run}: has no {RESULT_NAME}; only finished runs can be compared")
    folder = RunFolder(run).scores_of(name_step(result.final_step))
    if not any(folder.glob("*.json")):
        raise EvaluationError(f"{folder}: has no scores; the run's last checkpoint was not scored")
    return folder


def list_unscored(run: Path, name: str, trained: Path) -> list[str]:
    """A sentence for each of a run's two models that lacks scores its config asks for, or will never have them.

    Args:
        run: The run's folder.
        name: What it is called.
        trained: The scores of its last step.
    """
    evaluation, lines = read_evaluation(run), []
    of_base, of_trained = (_list_missing(evaluation, folder) for folder in (RunFolder(run).scores_of(BASE), trained))
    if of_base and not evaluation.get("evaluate_base", True):
        lines.append(
            f"not compared: {name} with a base of its own, which evaluation.evaluate_base=false leaves unscored"
        )
    elif of_base:
        lines.append(f"not scored yet: {name}'s base on {', '.join(of_base)}; {UNTIL_THEN}")
    if of_trained:
        lines.append(f"not scored yet: {name} on {', '.join(of_trained)}; {UNTIL_THEN}")
    return lines


def read_evaluation(run: Path) -> Mapping[str, Any]:
    """What a run's config asks for; empty when it has none that can be read."""
    try:
        values = json.loads(RunFolder(run).config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = values.get("evaluation") if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def list_texts(evaluation: Mapping[str, Any]) -> list[str]:
    """Names of the held-out texts, in the config's order."""
    return [item["name"] for item in evaluation.get("held_out", [])]


def _list_missing(evaluation: Mapping[str, Any], folder: Path) -> list[str]:
    asked = list_texts(evaluation)
    scores, texts = load_results(folder), load_held_out(folder, asked)
    keys = [
        f"{benchmark['name']}/{protocol}"
        for benchmark in evaluation.get("benchmarks", [])
        for protocol in evaluation.get("protocols", [])
    ]
    missing = [key for key in keys if key not in scores]
    return missing + [f"the text {text}" for text in asked if text not in texts]
