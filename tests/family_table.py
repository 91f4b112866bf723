"""The page of every family: a table of answers, and the words of every refusal below it."""

from __future__ import annotations

import re

import transformers

from tests.family_checks import FamilyReport

PAGE = "docs/families.md"
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/families.py"
COLUMNS = {
    "load": "every parameter with what was saved",
    "lens": "the tracer's reading of the last layer with the model's own logits, and that a layer's input decides what follows",
    "loss": "loss and every gradient of three documents, as training computes them, with `transformers`' own of each document"
    " alone in plain attention, to 1e-4 (one parameter by itself to 2e-4); and that no later token moves a logit",
    "plans": "the gradients under `full`, `freeze_deep` and `freeze_shallow`, of exactly the planned parameters",
    "cost": "the predicted number of parameters with the model's; where its code cannot be followed, its work is estimated",
    "export": "the written folder, loaded again, with what was trained, bit for bit, and frozen tensors with the base's",
}
HEAD = "\n".join(
    [
        "# Families",
        "",
        f"Every causal language model class of `transformers` {transformers.__version__}, as a random model of some ten thousand"
        " parameters with",
        "every kind of layer its config has, taken through what a run does with a model. Made by",
        f"`{COMMAND}`; CI repeats a third of it.",
        "",
        "| column | what is compared |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in COLUMNS.items()),
        "",
        "`exact` alone means documents packed in rows, any attention, no logits held. A remedy is what the self-test of the",
        "model at hand chose; `refused` comes with the words below. A dash means that an earlier refusal leaves nothing to",
        "ask. A model that cannot be traced can be trained under every plan that needs no profile.",
        "",
        "",
    ]
)


def render_page(reports: list[FamilyReport]) -> str:
    """The whole page."""
    rows = [f"| {report.model_type} | {report.class_name} | {' | '.join(_cells(report))} |" for report in reports]
    lines = [f"| model type | class | {' | '.join(COLUMNS)} |", "|" + "---|" * (2 + len(COLUMNS)), *rows]
    return HEAD + _count(reports) + "\n".join(lines) + "\n\n## Refusals\n\n" + _render_refusals(reports)


def normalise(answer: str) -> str:
    """An answer without its measured numbers, which differ in their last digits between machines."""
    return re.sub(r"\d[\d.]*(e[+-]\d+)?", "#", answer)


def _count(reports: list[FamilyReport]) -> str:
    trained = [report for report in reports if report.export == "exact"]
    packed = sum(report.loss == "exact" for report in trained)
    traced = sum(report.lens == "exact" for report in reports)
    return (
        f"Of {len(reports)} model types, {len(trained)} are trained and exported exactly, {packed} of them in packed rows"
        f" without a remedy; {traced} are traced. The rest is refused.\n\n"
    )


def _cells(report: FamilyReport) -> list[str]:
    return [_escape(answer.partition(": ")[0] if "refused: " in answer else answer) or "–" for answer in report.answers]


def _render_refusals(reports: list[FamilyReport]) -> str:
    lines = [
        f"- **{report.model_type}**, {stage}: {answer.partition('refused: ')[2]}"
        for report in reports
        for stage, answer in zip(COLUMNS, report.answers)
        if "refused: " in answer
    ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
