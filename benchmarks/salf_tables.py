"""Tables of a race in the layout of SALF's Tables 3 to 6, with verdicts, from the kept results alone.

A cell is the mean over the seeds that are done; "of" behind it says how many of those planned, where some are missing. Verdicts
compare arms over the seeds both have, prompt by prompt, and are corrected over all verdicts of a table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from salf_race import decode

from eval.label_scores import Metric, compare_seeds
from layerplan.artifacts import write_text
from layerplan.plan.holm import correct_holm

RACES = Path(__file__).resolve().parent / "races"
REFERENCE = "SALF[half]"
METHODS = (
    "LoRA[full]",
    "LoRA[half]",
    "LIFT[half]",
    "LIFT*[half]",
    "SALF[half]",
    "full",
    "freeze_shallow",
    "freeze_deep",
)
HALVED = ("LoRA[full], half the epochs", "full, half the epochs")
DRAWN = ("SALF[half], drawn order",)
BY_LORA = ("LIFT[half] by LoRA", "LIFT*[half] by LoRA", "SALF[half] by LoRA")
BUDGETS = ("half", "arith][bf", "arith][df", "geom][bf", "geom][df")
VARIANTS = ("SALF[half]", "SALF[half][ce]", "SALF[half][rank]")
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Results:
    """What a race has come to."""

    name: str
    known: dict[str, Any]
    planned: dict[str, Any]

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the plan."""
        return [task for task in self.planned["tasks"] if task in self.known["tasks"]]

    def find(self, task: str, method: str) -> dict[int, dict[str, Any]]:
        """Arms that are done, by seed."""
        keys = {seed: f"{task} | {method} | {seed}" for seed in self.planned["seeds"]}
        return {seed: self.known["arms"][key] for seed, key in keys.items() if key in self.known["arms"]}

    def has(self, method: str) -> bool:
        """Whether any arm of a method is done."""
        return any(self.find(task, method) for task in self.tasks)

    @property
    def num_planned(self) -> int:
        """Arms of the whole race."""
        return len(self.planned["seeds"]) * len(self.planned["arms"]) * len(self.planned["tasks"])


def write_page(folder: Path, out: Path) -> None:
    """Writes the page of every race whose results lie in a folder; what stands above the line of tables is kept."""
    parts = [render_race(load_results(path)) for path in sorted(folder.glob("*.json"))]
    marker = "<!-- tables: made by `python benchmarks/salf.py tables`; what stands above is written by hand -->"
    head = out.read_text(encoding="utf-8").split(marker)[0] if out.exists() else "# The race\n\n"
    write_text(out, "\n\n".join([head.rstrip(), marker, *parts]) + "\n")


def load_results(path: Path) -> Results:
    """The results beside what was planned."""
    planned = yaml.safe_load((RACES / f"{path.stem}.yaml").read_text(encoding="utf-8"))
    return Results(path.stem, json.loads(path.read_text(encoding="utf-8")), planned)


def render_race(results: Results) -> str:
    """Everything about one base."""
    known = results.known
    where = ", ".join(f"{name} {value}" for name, value in known["where"].items())
    seconds = sum(arm["seconds"]["all"] for arm in known["arms"].values())
    head = [
        f"## {results.name}: {known['base']['num_layers']} layers, {known['base']['model_type']}",
        "",
        f"{len(known['arms'])} of {results.num_planned} planned arms are done, in {seconds / 60:,.0f} minutes beside other work."
        f" Base sha256 {known['base']['sha256'][:12]}. {where}.",
        "",
        render_tasks(results),
    ]
    tables = [
        ("Table 3: macro F1", render_values(results, [*METHODS, *DRAWN, *HALVED, *BY_LORA], "macro_f1")),
        ("Accuracy", render_values(results, [*METHODS, *DRAWN, *HALVED, *BY_LORA], "accuracy")),
        ("Table 4: accuracy by budget", render_values(results, list_budget_arms(), "accuracy")),
        ("Table 5: share of the backward pass that was saved", render_savings(results)),
        ("Table 6: macro F1 by deviation", render_values(results, VARIANTS, "macro_f1")),
        ("Rows that SALF could give their own layer", render_matches(results)),
        *(
            (f"Verdicts on Table {table}", render_verdicts(results, methods))
            for table, methods in list_families().items()
        ),
        ("Mean deviation before and after", render_deviations(results)),
    ]
    return "\n".join(head) + "".join(f"\n\n### {title}\n\n{table}" for title, table in tables if table)


def list_budget_arms() -> list[str]:
    """Names of the arms of Table 4."""
    return [f"{method}[{budget}]" for method in ("LIFT*", "SALF") for budget in BUDGETS]


def render_tasks(results: Results) -> str:
    """Table 1's layout: classes, rows, prompts, and what the base answers."""
    rows = []
    for task in results.tasks:
        facts = results.known["tasks"][task]
        largest = max(facts["gold"].count(each) for each in set(facts["gold"])) / len(facts["gold"])
        counts = [str(len(facts["classes"])), f"{facts['rows']:,}", f"{len(facts['gold']):,}", f"{largest:.3f}"]
        rows.append([task, *counts, f"{facts['base_accuracy']:.3f}", facts["sha256"][:12]])
    headings = [
        "task",
        "classes",
        "training rows",
        "test prompts",
        "share of the largest class",
        "accuracy of the base",
        "sha256",
    ]
    return markdown(headings, rows)


def render_values(results: Results, methods: Sequence[str], metric: str) -> str:
    """A row per method, a column per task, and the mean over tasks."""
    rows = []
    for method in methods:
        if not results.has(method):
            continue
        found = [results.find(task, method) for task in results.tasks]
        values = [[arm[metric] for arm in arms.values()] for arms in found]
        mean = f"{np.mean([np.mean(each) for each in values]):.3f}" if all(values) else "–"
        rows.append([method, *(describe(each, len(results.planned["seeds"])) for each in values), mean])
    return markdown(["method", *results.tasks, "Avg."], rows) if rows else ""


def describe(values: Sequence[float], planned: int) -> str:
    """Mean over the seeds, and how far they lie apart."""
    if not values:
        return "–"
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}" + ("" if len(values) == planned else f", {len(values)} of {planned}")


def render_savings(results: Results) -> str:
    """Depth as planned and as counted, and FLOPs as counted; the mean over tasks and seeds."""
    rows = []
    for method in results.planned["arms"]:
        arms = [arm for task in results.tasks for arm in results.find(task, method).values()]
        if not arms:
            continue
        numbers = [("planned", "depth"), ("counted", "depth"), ("planned", "flops"), ("counted", "flops")]
        rows.append([method, *(f"{np.mean([arm[kind][unit] for arm in arms]):.3f}" for kind, unit in numbers)])
    return markdown(["method", "depth, planned", "depth, counted", "FLOPs, planned", "FLOPs, counted"], rows)


def list_families() -> dict[int, Sequence[str]]:
    """Arms whose verdicts are corrected together."""
    return {3: [*METHODS, *DRAWN, *HALVED, *BY_LORA], 4: list_budget_arms(), 6: VARIANTS}


def render_verdicts(results: Results, methods: Sequence[str]) -> str:
    """Arms beside SALF[half], by macro F1 and accuracy, corrected over all of them."""
    found = []
    metrics: tuple[Metric, ...] = ("macro_f1", "accuracy")
    num_tests = len(results.tasks) * len(methods) * len(metrics)
    for task in results.tasks:
        facts = results.known["tasks"][task]
        reference = results.find(task, REFERENCE)
        for method in methods:
            arms = results.find(task, method)
            shared = sorted(set(arms) & set(reference))
            if method == REFERENCE or not shared:
                continue
            one, two = ([decode(side[seed]["predicted"]) for seed in shared] for side in (reference, arms))
            verdicts = compare_seeds(decode(facts["gold"]), one, two, len(facts["classes"]), num_tests=num_tests)
            found += [(task, method, len(shared), verdicts[metric]) for metric in metrics]
    adjusted = correct_holm([verdict.p_value for *_, verdict in found])
    rows = [
        [
            task,
            method,
            str(seeds),
            verdict.metric.replace("_", " "),
            f"{verdict.difference:+.3f} [{verdict.interval[0]:+.3f}, {verdict.interval[1]:+.3f}]",
            f"{p:.3g}",
            "not told apart"
            if p >= SIGNIFICANT
            else "better than SALF"
            if verdict.difference > 0
            else "worse than SALF",
        ]
        for (task, method, seeds, verdict), p in zip(found, adjusted, strict=True)
    ]
    return (
        markdown(["task", "method", "seeds", "metric", f"difference from {REFERENCE}", "p (Holm)", "verdict"], rows)
        if rows
        else ""
    )


def render_matches(results: Results) -> str:
    """End-of-freezing layers of the rows of the first seed, and the share of rows that start at or above their own."""
    rows = []
    for task in results.tasks:
        for method in results.planned["arms"]:
            arms = results.find(task, method)
            arm = arms[min(arms)] if arms else {}
            if "matched" in arm:
                layers = ", ".join(f"{layer}: {count:,}" for layer, count in enumerate(arm["eof_rows"]) if count)
                told = [f"{arm[name]:.0%}" for name in ("told_by_eof", "told_by_chance", "told_by_start")]
                rows.append([task, method, f"{arm['matched']:.0%}", *told, layers])
    headings = ["task", "method", "matched", "own layer tells", "by chance", "start layer tells", "rows by own layer"]
    note = (
        "*Matched* rows start at or above their own layer. *Tells*: the share of the label's entropy it gives away.\n\n"
    )
    return note + markdown(headings, rows) if rows else ""


def render_deviations(results: Results) -> str:
    """Figures 5 and 6 as means: cosine deviation of the states 0..L of the test, of the first seed."""
    rows = []
    for task in results.tasks:
        rows.append([f"{task}, base", *(f"{each:.2f}" for each in results.known["tasks"][task]["base_deviation"])])
        for method in ("full", "LoRA[full]", REFERENCE):
            arms = results.find(task, method)
            if arms:
                rows.append([f"{task}, {method}", *(f"{each:.2f}" for each in arms[min(arms)]["deviation"])])
    states = len(rows[0]) - 1
    return markdown(["task, model", *("h" + str(state) for state in range(states))], rows)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
