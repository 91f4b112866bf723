"""What a run shows of itself at its end: the page, the numbers in the lineage, and the model card of its export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.significance import Verdict
from layerplan.artifacts import write_text
from layerplan.pipeline.lineage import note_results
from layerplan.pipeline.stages import RunContext
from layerplan.report.answers import Answers, read_answers
from layerplan.report.card import add_results
from layerplan.report.page import write_report
from layerplan.run_folder import CARD_NAME, FIGURES_NAME


def publish_report(context: RunContext) -> Answers:
    """Writes the page and its figures from what the run has made so far, and puts them and their numbers into the lineage.

    Returns:
        What a reader asks first, as it stands at the top of the page.
    """
    report = write_report(context.folder.root)
    answers = read_answers(context.folder.root)
    note_results(context.tracker, context.folder.root)
    for path in (report, context.folder.config):
        context.tracker.log_artifact(path)
    for path in sorted(context.folder.figures.glob("*.png")):
        context.tracker.log_artifact(path, FIGURES_NAME)
    return answers


def publish_card(context: RunContext, answers: Answers, verdicts: Sequence[Verdict], exported: Path | None) -> None:
    """Adds the results to the model card of the export, which is older than they are."""
    card = exported / CARD_NAME if exported is not None else None
    if card is None or not card.exists():
        return
    sentences = [f"{item.benchmark}/{item.protocol}: {item.sentence}" for item in verdicts]
    write_text(card, add_results(card.read_text(encoding="utf-8"), answers, sentences))
    context.tracker.log_artifact(card, "model_card")
