"""The answers to a reader's first questions as tables and sentences, for the page, the console and the model card alike."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from layerplan.durations import render_duration
from layerplan.report.answers import Answers, Cost, HeldOutText, ValidationLoss, Work

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings and rows."""
NOTHING = "–"
LONGEST_LINE = 160
"""Characters of a continuation on the console."""


def tabulate_texts(answers: Answers) -> Table:
    """Text that nobody trained on, before and after: a row for the validation rows, and one per held-out text.

    A text that the corpus may contain is marked, and the heading then claims nothing of all.
    """
    headings = (name_texts(answers), "unit", "base", "trained", "difference [95 %]", "p (Holm)")
    rows = [_validation_row(answers.validation)] if answers.validation is not None else []
    return headings, rows + [_held_out_row(text) for text in answers.held_out]


def name_texts(answers: Answers) -> str:
    """What the validation rows and the held-out texts are together."""
    return "text" if any(text.may_be_trained_on for text in answers.held_out) else "text not trained on"


def describe_texts(answers: Answers) -> list[str]:
    """A sentence per row of that table."""
    return [*describe_validation(answers.validation), *map(describe_held_out, answers.held_out)]


def describe_validation(loss: ValidationLoss | None) -> list[str]:
    """A sentence on the loss before and after; none where one of them is not known."""
    if loss is None or loss.base is None:
        return []
    return [
        f"Validation loss: {loss.base:.4f} before the first step, {loss.trained:.4f} after the last"
        f" ({describe_change(loss.base, loss.trained)})."
    ]


def describe_held_out(text: HeldOutText) -> str:
    """The verdict on a text with its name."""
    return f"{text.name}: {text.sentence.rstrip('.')}."


def describe_change(first: float, last: float) -> str:
    """How far a loss moved, as a share of what it was."""
    change = 100 * (last / first - 1)
    if math.isnan(change):
        return "not a number"
    if abs(change) < 0.5:
        return "unchanged within 1 %"
    return f"{abs(change):.0f} % {'higher' if change > 0 else 'lower'}"


def tabulate_cost(cost: Cost) -> Table:
    """What the plan promised beside what the run took."""
    rows = [
        ["parameters that train", _describe_params(cost), NOTHING],
        ["backward goes down to", f"layer {cost.first_gradient_layer}", NOTHING],
        _work_row(cost.work),
        *([_work_row(cost.work_elsewhere, "; the plan was made for these")] if cost.work_elsewhere is not None else []),
        ["time in steps", _least_time(cost), _time(cost)],
        _memory_row(cost),
        ["a checkpoint on disk", _gib(cost.predicted_checkpoint_gib), _gib(cost.checkpoint_gib)],
    ]
    return ("cost", "predicted", "measured"), rows


def tabulate_use(cost: Cost) -> Table:
    """Time and memory alone, where work per token is not the plan's."""
    rows = [["time in steps", NOTHING, _time(cost)], _memory_row(cost)]
    return ("cost", "predicted", "measured"), rows


def _memory_row(cost: Cost) -> list[str]:
    return ["memory of a worker", _gib(cost.predicted_memory_gib), _gib(cost.peak_memory_gib, " at its peak")]


def describe_cost(cost: Cost) -> str:
    """The cost in one line."""
    line = _describe_work(cost.work, in_rows=True)
    if cost.work_elsewhere is not None:
        line += f" (where the plan was made: {_describe_work(cost.work_elsewhere, in_rows=True)})"
    if cost.train_s is not None:
        line += f"; {render_duration(cost.train_s)} in steps"
        line += f" at {cost.mfu:.0%} of the workers' full rate" if cost.mfu else ""
    if cost.peak_memory_gib is not None:
        line += f"; {cost.peak_memory_gib:.2f} GiB a worker, {_gib(cost.predicted_memory_gib)} predicted"
    return line


def list_metrics(answers: Answers) -> dict[str, float]:
    """All numbers by name, for the lineage; what the run does not have is left out."""
    found: dict[str, float | None] = {}
    if (loss := answers.validation) is not None:
        found |= {"result/validation_loss/base": loss.base, "result/validation_loss/trained": loss.trained}
    for text in answers.held_out:
        names = ("base", "trained", "difference_low", "difference_high", "adjusted_p")
        values = (
            text.base,
            text.trained,
            *(text.interval or (None, None)),
            text.adjusted_p if text.is_judged else None,
        )
        found |= {f"result/{text.name}/bits_per_byte/{name}": value for name, value in zip(names, values, strict=True)}
    if (cost := answers.cost) is not None:
        found |= {
            "cost/rows_seq_len": float(cost.work.seq_len),
            "cost/gflop_per_token/predicted": cost.work.flops_per_token / 1e9,
            "cost/share_of_full/predicted": cost.work.share_of_full,
            "cost/train_s/at_full_rate": cost.least_train_s,
            "cost/train_s/measured": cost.train_s,
            "cost/tokens_per_s/measured": cost.tokens_per_s,
            "cost/mfu/measured": cost.mfu,
            "cost/memory_gib/predicted": cost.predicted_memory_gib,
            "cost/memory_gib/measured": cost.peak_memory_gib,
            "cost/checkpoint_gib/predicted": cost.predicted_checkpoint_gib,
            "cost/checkpoint_gib/measured": cost.checkpoint_gib,
        }
    return {name: value for name, value in found.items() if value is not None}


def list_continuations(answers: Answers) -> list[tuple[str, str]]:
    """One prompt as lines of (who, text on one line), shortened; the first that both models answered in words."""
    in_words = [item for item in answers.continuations if (item.base or "").strip() and (item.trained or "").strip()]
    for item in (in_words or answers.continuations)[:1]:
        said = (("prompt", item.prompt), ("base", item.base), ("trained", item.trained))
        return [(who, _shorten(show_text(text))) for who, text in said if text is not None]
    return []


def show_text(text: str | None) -> str:
    """A continuation as it is shown: words for one that has none, no empty line at its start and no more than one in a row."""
    if text is None:
        return NOTHING
    if not text:
        return "(nothing: the model ended the text at once)"
    if not text.strip():
        return f"(white space only, {len(text):,} characters)"
    begun = re.sub(r"\A(?:[ \t]*\n)+", "", text)
    return re.sub(r"(?:[ \t]*\n){3,}", "\n\n", begun).rstrip()


def _validation_row(loss: ValidationLoss) -> list[str]:
    size = "" if loss.num_rows is None else f" ({loss.num_rows:,} rows)"
    base, difference = "not measured", NOTHING
    if loss.base is not None:
        base, difference = f"{loss.base:.4f}", f"{loss.trained - loss.base:+.4f}"
    return [f"validation{size}", "nats/token", base, f"{loss.trained:.4f}", difference, NOTHING]


def _held_out_row(text: HeldOutText) -> list[str]:
    gap = "" if text.interval is None else " [{:+.4f}, {:+.4f}]".format(*text.interval)
    facts = [] if text.num_documents is None else [f"{text.num_documents:,} documents"]
    facts += ["may be trained on"] if text.may_be_trained_on else []
    return [
        f"{text.name} ({', '.join(facts)})" if facts else text.name,
        "bits/byte",
        f"{text.base:.4f}",
        f"{text.trained:.4f}",
        f"{text.trained - text.base:+.4f}{gap}",
        f"{text.adjusted_p:.3g}" if text.is_judged else NOTHING,
    ]


def _work_row(work: Work, note: str = "") -> list[str]:
    return [f"work in rows of {work.seq_len:,} tokens{note}", _describe_work(work), NOTHING]


def _describe_params(cost: Cost) -> str:
    return f"{cost.trainable_params:,} of {cost.total_params:,} ({cost.trainable_params / cost.total_params:.1%})"


def _describe_work(work: Work, *, in_rows: bool = False) -> str:
    rows = f" in rows of {work.seq_len:,} tokens" if in_rows else ""
    return f"{work.flops_per_token / 1e9:.4g} GFLOP per token{rows}, {work.share_of_full:.1%} of training everything"


def _least_time(cost: Cost) -> str:
    return NOTHING if cost.least_train_s is None else f"{render_duration(cost.least_train_s)} at the workers' full rate"


def _time(cost: Cost) -> str:
    if cost.train_s is None:
        return NOTHING
    share = f", {cost.mfu:.0%} of the workers' full rate (MFU)" if cost.mfu else ""
    return f"{render_duration(cost.train_s)}, {cost.tokens_per_s or 0:,.0f} tokens per second{share}"


def _gib(value: float | None, after: str = "") -> str:
    return NOTHING if value is None else f"{value:.2f} GiB{after}"


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…"
