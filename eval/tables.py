"""Scores in the layout of the paper's Tables 1, 2 and 10, as Markdown or LaTeX.

A cell holds generation and letters side by side, `generate / logit`, as the paper prints them; the average is the mean
of the four categories. The two other averages and the intervals follow, each by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.artifacts import Results
from eval.items import CATEGORIES
from eval.scoring import EvaluationResult
from eval.significance import compute_wilson
from eval.subjects import is_builtin
from layerplan.errors import EvaluationError
from layerplan.plan.markdown import as_text

TITLES = {"ceval": "C-Eval", "cmmlu": "CMMLU"}
PROTOCOLS = ("generate", "logit")
ABSENT = "–"


def render_scores(models: Mapping[str, Results], *, style: str = "markdown") -> str:
    """One table per benchmark, a row per model.

    Args:
        models: Name of each model to its results.
        style: `markdown` or `latex`.

    Raises:
        EvaluationError: When two models were scored under unequal protocols.
    """
    benchmarks = list(dict.fromkeys(result.benchmark for results in models.values() for result in results.values()))
    parts = []
    for benchmark in benchmarks:
        _check_protocols(models, benchmark)
        name = TITLES.get(benchmark, benchmark)
        scored = [item for results in models.values() for item in results.values() if item.benchmark == benchmark]
        if all(is_builtin(item.subjects) for item in scored):
            name = f"layerplan's built-in questions (format of {name})"
        title = f"{name}, accuracy in percent, generate / logit"
        headings = ["Models", *CATEGORIES, "Average", "Mean of subjects", "Of questions [95 %]", "Std. over repeats"]
        rows = [[name, *_cells(results, benchmark)] for name, results in models.items()]
        parts.append(render_table(title, headings, rows, style=style))
    return "\n".join(parts)


def render_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, style: str) -> str:
    """A table as `markdown` or `latex`."""
    return _latex(title, headings, rows) if style == "latex" else _markdown(title, headings, rows)


def _cells(results: Results, benchmark: str) -> list[str]:
    found = [results.get(f"{benchmark}/{protocol}") for protocol in PROTOCOLS]
    cells = [
        _pair([None if item is None else item.categories.get(category) for item in found]) for category in CATEGORIES
    ]
    cells.append(_pair([None if item is None else item.category_mean for item in found]))
    cells.append(_pair([None if item is None else item.subject_mean for item in found]))
    cells.append(" / ".join(ABSENT if item is None else _with_interval(item) for item in found))
    cells.append(_pair([None if item is None else item.repeat_std for item in found]))
    return cells


def _pair(values: Sequence[float | None]) -> str:
    return " / ".join(ABSENT if value is None else f"{value:.2f}" for value in values)


def _with_interval(result: EvaluationResult) -> str:
    low, high = compute_wilson(result.num_correct, result.num_asked)
    return f"{result.question_mean:.2f} [{low:.1f}, {high:.1f}]"


def _check_protocols(models: Mapping[str, Results], benchmark: str) -> None:
    for protocol in PROTOCOLS:
        ids = {
            name: results[key].protocol_id
            for name, results in models.items()
            if (key := f"{benchmark}/{protocol}") in results
        }
        if len(set(ids.values())) > 1:
            shown = ", ".join(f"{name} {identifier[:12]}" for name, identifier in ids.items())
            raise EvaluationError(f"{benchmark}/{protocol}: unequal protocol ids cannot be put in one table ({shown})")


def _markdown(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join([as_text(name), *cells]) + " |" for name, *cells in rows]
    return "\n".join(lines) + "\n"


def _latex(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(title)}}}",
        rf"\begin{{tabular}}{{l{'c' * (len(headings) - 1)}}}",
    ]
    lines += [r"\toprule", " & ".join(map(_escape, headings)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_escape, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


_LATEX = str.maketrans(
    {**{character: "\\" + character for character in "&%$#_{}"}, "\\": r"\textbackslash{}", ABSENT: "--"}
)


def _escape(text: str) -> str:
    return text.translate(_LATEX)
