"""What MLflow's table and page show of a run, read from its folder: numbers to sort by, hashes, and a description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from layerplan.plan.explain import summarize_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.markdown import as_code
from layerplan.report.answer_tables import list_metrics
from layerplan.report.answers import Answers, read_json, read_verdicts
from layerplan.report.card import render_card_rows, render_cost, render_texts
from layerplan.run_folder import FIGURES_NAME, PLAN_NAME, RunFolder
from layerplan.tracking.tracker import RUN_ID

NOTE_CHARS = 5000
"""What every version of MLflow takes in a tag."""
PICTURES = ("loss", "profiles", "layer_map")


def list_results(run_dir: Path, answers: Answers) -> dict[str, float]:
    """Losses, bits per byte, accuracies with their intervals and costs by name; what the run does not have is left out."""
    training = read_json(RunFolder(run_dir).training)
    losses = {
        "result/train_loss/first": training.get("first_loss"),
        "result/train_loss/final": training.get("final_loss"),
        "result/tokens_seen": training.get("tokens_seen"),
        "result/steps": training.get("final_step"),
    }
    found = {name: float(value) for name, value in losses.items() if value is not None}
    for verdict in read_verdicts(RunFolder(run_dir)):
        found |= _list_accuracies(verdict)
    return found | list_metrics(answers)


def list_tags(run_dir: Path) -> dict[str, str]:
    """The plan's hash and type."""
    plan = _read_plan(run_dir)
    return {} if plan is None else {"layerplan.plan_sha256": plan.sha256, "layerplan.plan_type": plan.plan_type}


def render_note(run_dir: Path, answers: Answers) -> str:
    """Markdown with plan, verdicts and pictures; what does not fit into a tag is left to the report, and that is said."""
    sentences = [
        f"{item['benchmark']}/{item['protocol']}: {item['sentence']}" for item in read_verdicts(RunFolder(run_dir))
    ]
    sections = [
        _render_plan(_read_plan(run_dir), answers),
        render_texts(answers, sentences),
        _render_pictures(run_dir),
        render_cost(answers),
    ]
    return fit_sections(["\n".join(lines).strip() for lines in sections if lines])


def render_sweep(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with the trials of a sweep, best first, as far as they fit."""
    headings = ("trial", "validation loss", "training loss", "FLOPs of full", "tokens/s")
    rows = [
        (
            str(item["name"]),
            _show(item["validation_loss"], ".4f"),
            _show(item["train_loss"], ".4f"),
            _show(item["flops_share"], ".1%"),
            _show(item["tokens_per_s"], ",.0f"),
        )
        for item in results
    ]
    while len(text := "\n".join(render_card_rows((headings, rows)))) > NOTE_CHARS:
        rows.pop()
    return text


def list_trial_results(item: Mapping[str, Any]) -> dict[str, float]:
    """A trial's numbers under the names that runs have, so that one chart shows both."""
    named = {
        "boundary": item["boundary"],
        "result/validation_loss/trained": item["validation_loss"],
        "result/train_loss/final": item["train_loss"],
        "cost/share_of_full/predicted": item["flops_share"],
        "cost/tokens_per_s/measured": item["tokens_per_s"],
    }
    named |= {f"result/{name}/loss": loss for name, loss in item.get("text_losses", {}).items()}
    return {name: float(value) for name, value in named.items() if value is not None}


def fit_sections(sections: Sequence[str], limit: int = NOTE_CHARS) -> str:
    """The sections that fit, in order, one empty line apart.

    Args:
        sections: The most important first.
        limit: Characters in all.
    """
    last = "The rest is in `report.html` among the artifacts."
    kept: list[str] = []
    for section in sections:
        if len("\n\n".join([*kept, section, last])) <= limit:
            kept.append(section)
    return "\n\n".join(kept if len(kept) == len(sections) else [*kept, last])


def _render_plan(plan: FreezePlan | None, answers: Answers) -> list[str]:
    if plan is None:
        return []
    steps = "" if answers.final_step is None else f", trained for {answers.final_step:,} steps"
    return [f"{as_code(plan.model.name)} under a `{plan.plan_type}` plan{steps}.", "", *summarize_plan(plan)]


def _render_pictures(run_dir: Path) -> list[str]:
    """Pictures among the run's own artifacts, at the address at which MLflow serves them beside its page."""
    there = [name for name in PICTURES if (RunFolder(run_dir).figures / f"{name}.png").is_file()]
    address = f"get-artifact?run_uuid={RUN_ID}&path="
    return [f"![{name}]({address}{quote(f'{FIGURES_NAME}/{name}.png', safe='')})\n" for name in there]


def _list_accuracies(verdict: Mapping[str, Any]) -> dict[str, float]:
    name = f"result/{verdict['benchmark']}/{verdict['protocol']}/accuracy"
    pairs = {
        "base": ("reference_accuracy", "reference_interval"),
        "trained": ("accuracy", "accuracy_interval"),
        "difference": ("difference", "difference_interval"),
    }
    found = {f"{name}/adjusted_p": verdict.get("adjusted_p")}
    for who, (value, interval) in pairs.items():
        low, high = verdict.get(interval, (None, None))
        found |= {f"{name}/{who}": verdict.get(value), f"{name}/{who}_low": low, f"{name}/{who}_high": high}
    return {key: float(value) for key, value in found.items() if value is not None}


def _read_plan(run_dir: Path) -> FreezePlan | None:
    return FreezePlan.load(run_dir / PLAN_NAME) if (run_dir / PLAN_NAME).exists() else None


def _show(value: float | None, shape: str) -> str:
    return "-" if value is None else format(value, shape)
