"""What a reader asks first of a run, read from its artifacts: is the text better, what did it cost, what does it say now.

One reading feeds the page, the summary on the console, the model card and the lineage, so that they say the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerplan.artifacts import read_lines
from layerplan.inside import is_plain_name
from layerplan.intervals import show_difference
from layerplan.plan.cost import GIB
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.plan_cost import PredictedCost
from layerplan.run_folder import (
    BASE,
    CONTINUATIONS_NAME,
    HELD_OUT_NAME,
    SEAL_NAME,
    TRAIN,
    RunFolder,
    list_scored_steps,
)


@dataclass(frozen=True)
class ValidationLoss:
    """Nats per token on the rows that the corpus sets aside."""

    num_rows: int | None
    """Rows; None when the store lies elsewhere."""
    base: float | None
    """Before the first step; None in runs of versions that did not look."""
    trained: float
    """After the last one."""


@dataclass(frozen=True)
class HeldOutText:
    """Bits per byte on a text that nobody trained on, as far as the corpus was kept free of it."""

    name: str
    num_documents: int | None
    """Documents; None when the base's result is gone."""
    base: float
    trained: float
    interval: tuple[float, float] | None
    """95 % interval of trained minus base; None where it is not known."""
    adjusted_p: float
    """Of no difference, Holm-corrected over the texts that are judged; 1 for the others."""
    sentence: str
    may_be_trained_on: bool = False
    """Whether the corpus was built while other documents than these were looked for."""

    @property
    def is_judged(self) -> bool:
        """Whether its p is that of a test; too few documents, or a loss that is not finite, have none."""
        return not self.sentence.startswith("not judged")


@dataclass(frozen=True)
class Work:
    """FLOPs of a plan, for rows of one length."""

    seq_len: int
    flops_per_token: float
    """Forward and backward."""
    share_of_full: float
    """Of training everything."""


@dataclass(frozen=True)
class Cost:
    """What the plan promised and what the run took; None is what was not predicted or not measured."""

    trainable_params: int
    total_params: int
    work: Work
    """For the rows of this run."""
    work_elsewhere: Work | None
    """For the rows that the plan was made for, when they are of another length."""
    first_gradient_layer: int
    """Lowest layer that backward enters."""
    train_s: float | None = None
    """Seconds in steps."""
    tokens_per_s: float | None = None
    mfu: float | None = None
    """Share of the workers' measured peak rate."""
    predicted_memory_gib: float | None = None
    peak_memory_gib: float | None = None
    """Of the worker that logs."""
    predicted_checkpoint_gib: float | None = None
    checkpoint_gib: float | None = None

    @property
    def least_train_s(self) -> float | None:
        """Seconds that the predicted work takes at the workers' full rate; None when it was not reached or measured."""
        return None if self.train_s is None or not self.mfu else self.train_s * self.mfu


@dataclass(frozen=True)
class Continuation:
    """One prompt, continued greedily; None is what a model was not asked."""

    prompt: str
    base: str | None
    trained: str | None


@dataclass(frozen=True)
class Answers:
    """All of them; empty or None is what the run does not have."""

    final_step: int | None
    validation: ValidationLoss | None
    held_out: tuple[HeldOutText, ...]
    cost: Cost | None
    continuations: tuple[Continuation, ...]
    built_in: tuple[str, ...] = ()
    """Benchmarks in whose place the package's own questions were asked."""


def read_answers(run_dir: Path) -> Answers:
    """Reads them from a run folder, finished or not, of this or an earlier version."""
    run = RunFolder(run_dir)
    training = read_json(run.training)
    step = training.get("final_step")
    return Answers(
        final_step=step,
        validation=_read_validation(run, training),
        held_out=tuple(_read_held_out(run)),
        cost=_read_cost(run, training),
        continuations=tuple(_pair_continuations(run)),
        built_in=tuple(_list_built_in(run)),
    )


def _list_built_in(run: RunFolder) -> Iterator[str]:
    asked = read_json(run.config).get("evaluation", {}).get("benchmarks", [])
    yield from (item["name"] for item in asked if item.get("path") == "builtin")


def _read_validation(run: RunFolder, training: Mapping[str, Any]) -> ValidationLoss | None:
    if training.get("validation_loss") is None:
        return None
    rows = read_json(run.manifest).get("num_validation_rows")
    return ValidationLoss(rows, training.get("base_validation_loss"), training["validation_loss"])


def read_verdicts(run: RunFolder) -> list[dict[str, Any]]:
    """Verdicts on benchmarks, as the run wrote them but for sentences of earlier versions."""
    verdicts = read_json(run.verdicts) or []
    return [
        item | {"sentence": _restate(item["sentence"], item["difference"], item["difference_interval"], 1)}
        if item.get("difference_interval")
        else item
        for item in verdicts
    ]


def _restate(sentence: str, difference: float, interval: Sequence[float], decimals: int) -> str:
    """A sentence that gave half the width of the interval, as if it lay evenly around the difference, with both ends."""
    low, high = interval
    shown = show_difference(difference, (low, high), decimals)
    sentence = re.sub(r" by [\d.]+ ± [\d.]+ points \(p", lambda _: f" ({shown} points, p", sentence, count=1)
    return re.sub(r"\([+-][\d.]+ ± [\d.]+", lambda _: f"({shown}", sentence, count=1)


def _read_held_out(run: RunFolder) -> list[HeldOutText]:
    """In the order of the config, the others after them."""
    asked = (read_json(run.config).get("evaluation") or {}).get("held_out") or []
    places = {item["name"]: place for place, item in enumerate(asked)}
    verdicts = sorted(read_json(run.held_out_verdicts) or [], key=lambda item: places.get(item["name"], len(places)))
    texts = []
    for item in verdicts:
        name = f"{item['name']}.json"
        scores = read_json(run.scores_of(BASE) / HELD_OUT_NAME / name) if is_plain_name(name) else {}
        sizes = scores.get("document_bytes")
        low, high = item["difference_interval"] or (None, None)
        interval = None if low is None or high is None else (low, high)
        numbers = (item["base"], item["trained"], interval, item["adjusted_p"])
        sentence = item["sentence"]
        if interval is not None:
            sentence = _restate(sentence, item["trained"] - item["base"], interval, 4)
        in_doubt = bool(item.get("may_be_trained_on"))
        texts.append(HeldOutText(item["name"], len(sizes) if sizes else None, *numbers, sentence, in_doubt))
    return texts


def _read_cost(run: RunFolder, training: Mapping[str, Any]) -> Cost | None:
    plan = FreezePlan.load(run.plan) if run.plan.exists() else None
    planned = plan.predicted_cost if plan is not None else None
    written = read_json(run.predicted_cost)
    here = PredictedCost.model_validate(written) if written else planned
    if here is None:
        return None
    cost = here.plan
    lines = [line for line in read_lines(run.metrics) if line.get("run") == TRAIN]
    predicted = [line["perf/predicted_memory_gib"] for line in lines if "perf/predicted_memory_gib" in line]
    peaks = [line["perf/peak_memory_gib"] for line in lines if "perf/peak_memory_gib" in line]
    return Cost(
        trainable_params=cost.trainable_params,
        total_params=cost.total_params,
        work=_read_work(here),
        work_elsewhere=_read_work(planned) if planned is not None and planned.seq_len != here.seq_len else None,
        first_gradient_layer=cost.first_gradient_layer,
        train_s=training.get("train_s"),
        tokens_per_s=training.get("tokens_per_s"),
        mfu=training.get("mfu"),
        predicted_memory_gib=max(predicted, default=None),
        peak_memory_gib=max(peaks, default=None),
        predicted_checkpoint_gib=cost.checkpoint_bytes / GIB,
        checkpoint_gib=_measure_checkpoint(run, training),
    )


def _read_work(predicted: PredictedCost) -> Work:
    return Work(predicted.seq_len, predicted.plan.total_flops, predicted.flops_share)


def _measure_checkpoint(run: RunFolder, training: Mapping[str, Any]) -> float | None:
    """Size of the last checkpoint by its seal; None without one."""
    seal = read_json(run.root / (training.get("final_checkpoint") or "") / SEAL_NAME) if training else {}
    return sum(mark["size"] for mark in seal["files"].values()) / GIB if seal else None


def _pair_continuations(run: RunFolder) -> list[Continuation]:
    """By prompt; the newest scored checkpoint that continued any stands for the result."""
    base = _read_continuations(run.scores_of(BASE))
    newest_first = map(run.scores_of, reversed(list_scored_steps(run.evaluation)))
    newest = next((found for folder in newest_first if (found := _read_continuations(folder))), {})
    return [Continuation(prompt, base.get(prompt), newest.get(prompt)) for prompt in dict.fromkeys([*base, *newest])]


def _read_continuations(folder: Path) -> dict[str, str]:
    records = read_lines(folder / CONTINUATIONS_NAME)
    return {record["prompt"]: record["text"] for record in records}


def read_json(path: Path) -> Any:
    """A JSON file; an empty object when there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
