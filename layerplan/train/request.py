"""What goes into a training run and what comes out of it, as values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layerplan.artifacts import write_json
from layerplan.config.base import describe_fault
from layerplan.config.finetune import LabelLoss, LoraOptions
from layerplan.config.train import TrainConfig
from layerplan.errors import CheckpointError
from layerplan.inside import lies_inside
from layerplan.models.ref import ModelRef
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.run_folder import RESULT_NAME
from layerplan.train.metrics import MetricSink


@dataclass(frozen=True)
class CheckpointValidation:
    """What Ray Train does with some checkpoints beside training; each is kept until that is done."""

    fn: Callable[[Any], dict[str, Any]]
    """From a committed `ray.train.Checkpoint` to metrics, called in a Ray task of its own, one at a time."""
    steps: range
    """Steps whose checkpoints are meant."""


@dataclass(frozen=True)
class LabelOptions:
    """How prompts with a label are trained on."""

    loss: LabelLoss = "vocabulary"
    """What the state at the label's position is compared with."""
    trains_alone: bool = False
    """Whether of the layers from the start layer on only that one trains (LIFT)."""
    lora: LoraOptions | None = None
    """Adapters that train in place of the layers' weights."""


@dataclass(frozen=True)
class Judging:
    """Held-out rows by which trainings are compared row by row, and where their losses are written."""

    metric: str
    """What is measured at every validation beside the corpus's own held-out rows; the rest before the first step and after
    the last."""
    texts: Path | None
    """Rows of further texts (`layerplan/train/held_out_rows.py`); None for the corpus's own alone."""
    base: Path
    """Losses of the base; measured by the training that finds none."""
    result: Path
    """Losses after the last step."""


@dataclass(frozen=True)
class TrainRequest:
    """Everything a training run needs; travels to the workers."""

    run_dir: Path
    model: ModelRef
    plan: FreezePlan
    store: Path | str
    """Token store: a local folder, or an address such as `s3://bucket/store`."""
    config: TrainConfig
    seed: int
    sink_factory: Callable[[int], MetricSink] | None = None
    """(start step) to the sink of rank 0."""
    recipe: LossRecipe | None = None
    """How the model's loss is computed; None lets the workers ask it."""
    document_mask: bool = True
    """Whether documents that share a row are told apart."""
    validation: CheckpointValidation | None = None
    """Called with checkpoints while training goes on; None calls nothing."""
    records: tuple[Path, ...] = ()
    """Files beside the ledger that grow while training, such as those of the sink."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the workers."""
    labels: LabelOptions | None = None
    """How a store of prompts with a label is trained on; None for one whose every token is learned."""
    judging: Judging | None = None
    """How the result is compared with others row by row; None for a run that stands alone."""
    board: Any = None
    """Actor that the workers tell where they are; None when nobody watches for stalls."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run came to."""

    final_step: int
    final_checkpoint: Path
    first_loss: float
    final_loss: float
    validation_loss: float | None
    tokens_seen: int
    train_s: float
    """Seconds in steps, over all attempts."""
    wall_s: float
    """Seconds of the call that finished it."""
    tokens_per_s: float
    mfu: float
    """On the plan's own FLOPs, over all steps."""
    skipped_steps: int
    rollbacks: int
    proof: dict[str, int | float | str]
    """How often it was shown that the plan is obeyed, and on how many tensors."""
    stopped_early: bool
    hf_dir: Path | None
    """Exported folder; None when training stopped early."""
    base_validation_loss: float | None = None
    """Before the first step; None when there are no held-out rows, and in results of versions that did not look."""

    propagated_rows: tuple[int, ...] = ()
    """Prompts with a label by the decoder layer their backward pass ended at."""
    worlds: tuple[tuple[int, int], ...] = ()
    """(step, workers): from which step on how many trained; empty in results of versions that did not note it."""
    mean_workers: float = 1.0
    """Over all steps."""
    micro_batch_size: int = 0
    """Rows of a forward pass, as the config says or `auto` came to; 0 in results of versions that did not note it."""

    def save(self, run_dir: Path) -> None:
        """Writes `training.json` atomically, with paths relative to the run folder."""
        values = asdict(self)
        for key in ("final_checkpoint", "hf_dir"):
            values[key] = None if values[key] is None else os.path.relpath(values[key], run_dir)
        write_json(run_dir / RESULT_NAME, values)


def load_result(run_dir: Path) -> TrainResult | None:
    """Reads the result of a finished run, or returns None.

    Raises:
        CheckpointError: When `training.json` is not readable.
    """
    path = run_dir / RESULT_NAME
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("final_checkpoint", "hf_dir"):
            values[key] = None if values[key] is None else run_dir / values[key]
            if values[key] is not None and not lies_inside(values[key], run_dir):
                raise ValueError(f"{key} leads out of the run folder")
        return TypeAdapter(TrainResult).validate_python(values)
    except ValidationError as error:
        fault = describe_fault(error)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fault = " ".join(str(error).split())[:200]
    raise CheckpointError(f"{path}: cannot be read ({fault}); delete it to continue from the checkpoints")
