"""What a run's scores say beside its base's: verdicts on benchmarks and held-out texts, written, told, put into the lineage."""

from __future__ import annotations

from pathlib import Path

from eval.artifacts import Results
from eval.during_training import compare_with_base
from eval.held_out import HeldOutVerdict, judge_held_out, load_held_out
from eval.significance import Verdict
from eval.tables import render_scores
from layerplan.artifacts import write_json, write_text
from layerplan.config.evaluation import EvaluationConfig
from layerplan.corpus.build import may_hold
from layerplan.corpus.manifest import Manifest
from layerplan.pipeline.stages import RunContext, say, tracked
from layerplan.pipeline.texts import hash_texts
from layerplan.run_folder import BASE, SCORES_STEM, RunFolder


def judge(context: RunContext, base: Results, trained: Results, label: str, store: Path | str) -> list[Verdict]:
    """Compares the trained model with the untouched base, corrected over every comparison of the run."""
    folder, name = context.folder.evaluation, context.config.name
    verdicts = compare_with_base(folder, label, trained, name=name)
    write_json(context.folder.verdicts, [verdict.model_dump(mode="json") for verdict in verdicts])
    for suffix, style in (("md", "markdown"), ("tex", "latex")):
        write_text(folder / f"{SCORES_STEM}.{suffix}", render_scores({BASE: base, name: trained}, style=style))
    in_doubt = may_hold(Manifest.load(store), hash_texts(context.config))
    judged = judge_asked_texts(context.folder, label, context.config.evaluation, in_doubt=in_doubt)
    for verdict in judged:
        say("verdict", f"{verdict.name}: {verdict.sentence}")
    with tracked(context, "verdict") as tracker:
        for path in (context.folder.verdicts, *sorted(folder.glob("*.*"))):
            tracker.log_artifact(path)
    return verdicts


def judge_asked_texts(
    run: RunFolder, label: str, config: EvaluationConfig, *, in_doubt: bool = False
) -> list[HeldOutVerdict]:
    """Compares a model with the base on the texts that the config lists, and writes the verdicts.

    Scores and verdicts on texts that it listed once may lie there still; they are no part of the result.

    Args:
        run: The run.
        label: The model's scores.
        config: Lists the texts.
        in_doubt: Whether the corpus may contain some of their documents; the verdicts say so.
    """
    names = [item.name for item in config.held_out]
    base, trained = (load_held_out(run.scores_of(scored), names) for scored in (BASE, label))
    judged = judge_held_out([(base[name], result) for name, result in trained.items() if name in base])
    if in_doubt:
        judged = [verdict.with_doubt() for verdict in judged]
    if judged or run.held_out_verdicts.exists():
        write_json(run.held_out_verdicts, [verdict.model_dump(mode="json") for verdict in judged])
    return judged
