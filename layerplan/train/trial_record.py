"""How a trial ended, as a value that is written once; a sweep that goes on reads it and does not run the trial again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerplan.artifacts import read_lines, write_text
from layerplan.config.base import StrictModel, describe_fault
from layerplan.config.sweep import VALIDATION_LOSS, Side
from layerplan.errors import ConfigError
from layerplan.run_folder import BOUNDARY_PREFIX, REPORTS_NAME, TRIAL_NAME


class TrialRecord(StrictModel):
    """One trial and its numbers; losses are nats a token."""

    name: str
    """Folder below the sweep."""
    boundary: int
    """Layers [0, boundary) are shallow."""
    freeze: Side = "deep"
    """The side that froze."""
    ends: str = ""
    """Which of embeddings, final norm and head trained."""
    learning_rate: float | None = None
    """Peak learning rate."""
    seed: int | None = None
    """Seed of the data order."""
    step: int
    """Steps it trained for."""
    max_steps: int
    """Steps of its schedule."""
    loss: float | None
    """What the sweep wants low; None of a trial that failed."""
    validation_loss: float | None = None
    """On the rows held out of the corpus."""
    text_losses: dict[str, float] = {}
    """On `evaluation.held_out`, by name; only of trials that came to their last step, but for the metric itself."""
    train_loss: float | None = None
    """Newest logged training loss."""
    tokens_per_s: float | None = None
    """Of all workers, over all steps."""
    train_s: float | None = None
    """Seconds in steps."""
    wall_s: float | None = None
    """Seconds from the trial's begin to its end, of the job that ended it."""
    flops_share: float
    """Predicted FLOPs per token as a share of full training."""
    flops: float | None = None
    """Predicted FLOPs of its whole schedule."""
    error: str = ""
    """Why it failed."""

    @property
    def was_stopped(self) -> bool:
        """Whether the scheduler stopped it before its last step."""
        return not self.error and self.step < self.max_steps

    @property
    def sort_key(self) -> tuple[bool, float, str]:
        """Best first: those that came to their end before those that were stopped, then by loss."""
        return self.was_stopped or bool(self.error), math.inf if self.loss is None else self.loss, self.name

    def judged_by(self, metric: str) -> TrialRecord:
        """The same with another metric's loss; None where it was not measured."""
        loss = self.validation_loss if metric == VALIDATION_LOSS else self.text_losses.get(metric)
        return self.model_copy(update={"loss": loss})

    def save(self, folder: Path) -> None:
        """Writes it into the trial's folder."""
        write_text(folder / TRIAL_NAME, self.model_dump_json(indent=2) + "\n")


def load_record(folder: Path) -> TrialRecord | None:
    """How a trial ended; None when it did not.

    Raises:
        ConfigError: When the file cannot be read.
    """
    path = folder / TRIAL_NAME
    try:
        return TrialRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigError(f"{path}: not a trial's record ({describe_fault(error)}); delete it") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); delete it") from None


def load_records(sweep: Path) -> list[TrialRecord]:
    """Of every trial that ended, best first."""
    found = (load_record(path.parent) for path in sweep.glob(f"{BOUNDARY_PREFIX}*/{TRIAL_NAME}"))
    return sorted((each for each in found if each is not None), key=lambda each: each.sort_key)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """What a trial reported before its last step, in order, each step once."""
    by_step = {line["step"]: line for line in read_lines(folder / REPORTS_NAME) if "step" in line}
    return [by_step[step] for step in sorted(by_step)]


def add_report(folder: Path, report: dict[str, Any]) -> None:
    """Appends a report, on a line of its own behind what a kill cut short."""
    path = folder / REPORTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        is_cut = file.tell() > 0 and not path.read_bytes().endswith(b"\n")
        file.write((b"\n" if is_cut else b"") + json.dumps(report).encode() + b"\n")
