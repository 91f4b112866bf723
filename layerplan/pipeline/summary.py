"""The last thing a run prints: scores beside the base's, the verdicts, and where everything lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.significance import Verdict
from layerplan.log import WIDTH
from layerplan.plan.explain import render_layer_map
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.report.answer_tables import (
    describe_change,
    describe_cost,
    describe_texts,
    list_continuations,
    name_texts,
    tabulate_texts,
)
from layerplan.report.answers import Answers
from layerplan.report.headline import describe_built_in, describe_repair, list_clauses, say_headline
from layerplan.train.trainer import TrainResult


def print_summary(
    plan: FreezePlan, result: TrainResult, verdicts: Sequence[Verdict], answers: Answers, report: Path
) -> None:
    """Prints the summary of a finished run: plan, training, cost, text and words before and after, verdicts."""
    console = Console(width=WIDTH)
    console.print(f"\nplan      {plan.plan_type}: {plan.reason}", highlight=False)
    console.print(f"          {render_layer_map(plan)}", highlight=False)
    change = describe_change(result.first_loss, result.final_loss)
    console.print(
        f"training  loss {result.first_loss:.3f} -> {result.final_loss:.3f} ({change}),"
        f" {result.tokens_seen:,} tokens, {result.tokens_per_s:,.0f} tokens/s",
        highlight=False,
    )
    if answers.cost is not None:
        console.print(f"cost      {describe_cost(answers.cost)}", highlight=False)
    print_answers(answers, console)
    if verdicts:
        print_verdicts(verdicts)
    headline = say_headline(list_clauses(answers, [verdict.model_dump() for verdict in verdicts]))
    if headline:
        print(f"verdict   {headline}")
    if plan.model.source is not None:
        print(f"note      {describe_repair(plan.model.source)}")
    if verdicts and answers.built_in:
        print(f"note      {describe_built_in(answers.built_in)}")
    print(f"\nreport    {report}")


def print_answers(answers: Answers, console: Console) -> None:
    """Prints the text before and after as a table and in sentences, and one prompt continued by both models."""
    headings, rows = tabulate_texts(answers)
    if rows:
        table = Table(*headings, title=f"{name_texts(answers).capitalize()}, before and after")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in describe_texts(answers):
        console.print(line, highlight=False, markup=False)
    said = list_continuations(answers)
    if said:
        console.print("\nWhat it says now:", highlight=False)
    for who, text in said:
        console.print(f"  {who:<9}{text}", highlight=False, markup=False)


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Prints scores beside those they are compared with, and one sentence each."""
    console = Console(width=WIDTH)
    console.print(_score_table(verdicts))
    for verdict in verdicts:
        console.print(f"{verdict.benchmark}/{verdict.protocol}: {verdict.sentence}", highlight=False, markup=False)


def _score_table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(title="Accuracy, percent [95 % interval]")
    is_one_pair = len({(verdict.run, verdict.reference) for verdict in verdicts}) == 1
    arms = ("base", "trained") if is_one_pair else ("compared with", "run")
    for heading in ("scored by", "n", *arms, "difference", "p (Holm)"):
        table.add_column(heading, overflow="fold")
    for verdict in verdicts:
        reference = _with_interval(verdict.reference_accuracy, verdict.reference_interval)
        accuracy = _with_interval(verdict.accuracy, verdict.accuracy_interval)
        table.add_row(
            f"{verdict.benchmark}/{verdict.protocol}",
            str(verdict.num_questions),
            reference if is_one_pair else f"{escape(verdict.reference)}\n{reference}",
            accuracy if is_one_pair else f"{escape(verdict.run)}\n{accuracy}",
            f"{verdict.difference:+.1f} [{verdict.difference_interval[0]:+.1f}, {verdict.difference_interval[1]:+.1f}]",
            f"{verdict.adjusted_p:.3g}",
        )
    return table


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"
