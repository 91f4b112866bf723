"""`report.html`: one self-contained page made from the artifacts of a run folder, and from nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from layerplan.artifacts import read_lines, write_text
from layerplan.aside import writing_aside
from layerplan.plan.explain import describe_older_rule, list_module_layers, name_ranges
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile
from layerplan.report.answers import read_answers, read_verdicts
from layerplan.report.ending import render_ending
from layerplan.report.figures import build_layer_figures, draw_loss
from layerplan.report.headline import (
    describe_built_in,
    describe_repair,
    list_clauses,
    rate_verdict,
    render_headline,
)
from layerplan.report.html_parts import embed_svg, render_sentence, render_table
from layerplan.report.labels import render_labels
from layerplan.report.measurement import read_deviations, render_measurement
from layerplan.report.outcome import render_outcome
from layerplan.report.proof import render_proof
from layerplan.report.scores import render_checkpoint_scores
from layerplan.report.style import STYLE
from layerplan.report.sweep import render_sweep_section
from layerplan.run_folder import TRAIN, RunFolder
from layerplan.train.world import describe_worlds

_SCORES_NOTE = (
    "Percent of questions answered rightly, of four choices. logit: the letter that is likeliest as the next token; generate:"
    " the letter in the answer that the model writes. p is that of no difference, corrected for all comparisons made (Holm)."
)
_COUNTS = {"in": "documents read", "kept": "documents kept"}


def write_report(run_dir: Path) -> Path:
    """Writes the page and its figures as PNG; what a run has not made yet is left out.

    Returns:
        Path of the page.
    """
    run = RunFolder(run_dir)
    plan = FreezePlan.load(run.plan) if run.plan.exists() else None
    profile = LayerProfile.load(run.profile) if run.profile.exists() else None
    figures = build_layer_figures(profile, plan, read_deviations(run_dir)) if profile is not None else {}
    training = _read(run.training)
    lines = [line for line in read_lines(run.metrics) if line.get("run") == TRAIN]
    if lines:
        figures["loss"] = draw_loss(lines)
    sweep, sweep_figures = render_sweep_section(run.sweep)
    save_figures(run.figures, figures | sweep_figures)
    answers = read_answers(run_dir)
    verdicts = read_verdicts(run)
    labels = render_labels(run, answers.cost)
    sections = [
        _head(run_dir, plan, training),
        render_ending(run),
        "" if labels else render_headline(list_clauses(answers, verdicts)),
        _note(plan, training),
        labels,
        render_outcome(replace(answers, cost=None) if labels else answers),
        _verdict_section(verdicts, answers.built_in),
        render_checkpoint_scores(run.evaluation),
        _plan_section(plan),
        _training_section(training, figures),
        sweep,
        render_measurement(profile, figures, plan),
        render_proof(run),
        _corpus_section(_read(run.manifest)),
        _config_section(run_dir),
    ]
    body = "\n".join(section for section in sections if section)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>layerplan: {html.escape(run_dir.name)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
    write_text(run.report, page)
    return run.report


def save_figures(folder: Path, figures: dict[str, Figure]) -> None:
    """Writes each figure as a PNG."""
    for name, figure in figures.items():
        with writing_aside(folder / f"{name}.png") as aside:
            figure.savefig(aside, format="png", dpi=150)


def _head(run_dir: Path, plan: FreezePlan | None, result: dict[str, Any] | None) -> str:
    subtitle = ""
    if plan is not None:
        subtitle = f"{html.escape(plan.model.name)}, plan <code>{html.escape(plan.plan_type)}</code>"
    if result is not None:
        subtitle += f", continued for {result['final_step']:,} steps on {result['tokens_seen']:,} tokens"
    return f'<h1>{html.escape(run_dir.name)}</h1><p class="soft">{subtitle}</p>'


def _note(plan: FreezePlan | None, training: dict[str, Any] | None) -> str:
    if plan is None or plan.model.source is None or training is None:
        return ""
    return f'<p class="soft">Note: {html.escape(describe_repair(plan.model.source))}.</p>'


def _plan_section(plan: FreezePlan | None) -> str:
    if plan is None:
        return ""
    cells = [("embed", plan.train_embeddings)]
    cells += [(str(layer), layer in plan.trainable_layers) for layer in range(plan.model.num_layers)]
    cells += [("norm", plan.train_final_norm), ("head", plan.train_lm_head)]
    partly = {str(layer): ", ".join(names) for layer, names in plan.trainable_modules.items()}
    drawn = "".join(_draw_cell(name, trains, partly.get(name)) for name, trains in cells)
    text = f"<h2>The plan</h2><p>{html.escape(plan.reason)}</p><div class='map'>{drawn}</div>"
    if older := describe_older_rule(plan):
        text += f"<p>{html.escape(older)}</p>"
    striped = ", striped in part (hold the pointer over a layer)" if partly else ""
    text += f'<p class="soft">Amber trains{striped}, blue is frozen; layer 0 is beside the embeddings.</p>'
    return text + _module_table(plan)


def _draw_cell(name: str, trains: bool, modules: str | None) -> str:
    kind = "cell" if name.isdigit() else "cell named"
    if modules is None:
        return f'<div class="{kind} {"on" if trains else "off"}">{name}</div>'
    return f'<div class="{kind} part" title="{html.escape(modules, quote=True)}">{name}</div>'


def _module_table(plan: FreezePlan) -> str:
    if not plan.trainable_modules:
        return ""
    rows = [[name, str(len(layers)), name_ranges(layers)] for name, layers in list_module_layers(plan).items()]
    return render_table(["module", "layers it trains in", "which"], rows)


def _verdict_section(verdicts: Sequence[dict[str, Any]], built_in: Sequence[str]) -> str:
    if not verdicts:
        return ""
    rows = [
        [
            f"{item['benchmark']} / {item['protocol']}",
            str(item["num_questions"]),
            _interval(item["reference_accuracy"], item["reference_interval"]),
            _interval(item["accuracy"], item["accuracy_interval"]),
            _difference(item),
            f"{item['adjusted_p']:.3g}",
        ]
        for item in verdicts
    ]
    sentences = "".join(
        render_sentence(f"{item['benchmark']} / {item['protocol']}: {item['sentence']}", rate_verdict(item))
        for item in verdicts
    )
    headings = ["benchmark", "questions", "base [95 %]", "trained [95 %]", "difference [95 %]", "p (Holm)"]
    note = f"{_SCORES_NOTE} {describe_built_in(built_in)}." if built_in else _SCORES_NOTE
    soft = f'<p class="soft">{html.escape(note)}</p>'
    return f"<h2>The verdict of the benchmarks</h2>{render_table(headings, rows)}{soft}{sentences}"


def _training_section(result: dict[str, Any] | None, figures: dict[str, Figure]) -> str:
    if result is None and "loss" not in figures:
        return ""
    text = "<h2>Training</h2>"
    if "loss" in figures:
        text += embed_svg(figures["loss"])
    if result is not None:
        rows = [
            ["steps", f"{result['final_step']:,}"],
            ["tokens", f"{result['tokens_seen']:,}"],
            ["loss, first to last logged", f"{result['first_loss']:.3f} to {result['final_loss']:.3f}"],
            ["steps left out", str(result["skipped_steps"])],
        ]
        worlds = describe_worlds([(step, workers) for step, workers in result.get("worlds", [])])
        rows += [["trained by", worlds]] if worlds else []
        text += render_table(["measured", ""], rows)
    return text


def _corpus_section(manifest: dict[str, Any] | None) -> str:
    if manifest is None:
        return ""
    counts = manifest["counts"]
    rows = [[label, f"{counts[name]:,}"] for name, label in _COUNTS.items() if name in counts]
    rows += [
        [f"left out: {name.replace('_', ' ')}", f"{count:,}"] for name, count in counts.items() if name not in _COUNTS
    ]
    rows += [["rows", f"{manifest['num_rows']:,}"], ["tokens", f"{manifest['num_tokens']:,}"]]
    return "<h2>Corpus</h2>" + render_table(["corpus", "count"], rows)


def _config_section(run_dir: Path) -> str:
    path = RunFolder(run_dir).config
    if not path.exists():
        return ""
    text = html.escape(path.read_text(encoding="utf-8"))
    return f"<h2>Configuration</h2><details><summary>resolved_config.json</summary><pre>{text}</pre></details>"


def _interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _difference(verdict: Mapping[str, Any]) -> str:
    low, high = verdict.get("difference_interval") or (None, None)
    shown = f"{verdict['difference']:+.1f}"
    return shown if low is None or high is None else f"{shown} [{low:+.1f}, {high:+.1f}]"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
