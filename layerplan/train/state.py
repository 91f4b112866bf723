"""Everything of a training run that resumes beside tensors, as one value."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from layerplan.config.base import StrictModel, describe_fault
from layerplan.errors import CheckpointError
from layerplan.run_folder import STATE_NAME

PROOF_FIELDS = (
    "gradient_coverage",
    "coverage_checks",
    "frozen_checksum",
    "frozen_checks",
    "frozen_check_s",
    "loss_recipe",
    "self_tests",
    "self_test_difference",
)
"""What shows that the plan is obeyed."""


class TrainState(StrictModel):
    """The data state is `step + data_offset`: the order of the corpus is a function of it."""

    step: int = 0
    """Optimizer steps taken."""
    tokens_seen: int = 0
    """Tokens trained on, padding left out."""
    skipped_steps: int = 0
    """Steps whose update was left out because of a non-finite loss or gradient."""
    skipped_spikes: int = 0
    """Steps whose update was left out because of a loss far above the recent ones, as `on_spike: skip` asks."""
    rollbacks: int = 0
    """Returns to a checkpoint because of a bad step."""
    horizons: tuple[tuple[int, int], ...] = ()
    """(step, max_steps): from which step on the learning rate follows the schedule of how many steps; empty in states of
    versions that took no more steps than they were begun with."""
    worlds: tuple[tuple[int, int], ...] = ()
    """(step, workers): from which step on how many workers trained; empty in states of versions that did not note it."""
    data_offset: int = 0
    """Steps of the data order that were passed over by rollbacks: step s reads the rows of s + data_offset."""
    data_cursor: tuple[int, ...] = ()
    """Next row of every lane when rows are made while training; a token store needs none."""
    recent_losses: tuple[float, ...] = ()
    """What the loss-spike detector remembers."""
    window_losses: tuple[float, ...] = ()
    """Losses of the steps since the last log line."""
    gradient_coverage: dict[str, int] = {}
    """Numbers of parameters the first step proved to have, and to lack, a gradient."""
    coverage_checks: int = 0
    """Times gradients were compared with the plan: at the first step, after every restart and change of plan."""
    frozen_checksum: str = ""
    """Checksum of all tensors the plan at hand freezes, after the dtype they are held in."""
    frozen_checks: int = 0
    """Times the frozen tensors were found unchanged."""
    frozen_check_s: float = 0.0
    """Seconds spent on it, over all attempts."""
    loss_recipe: str = ""
    """How the loss is computed; empty in states of versions that did not ask the model."""
    self_tests: int = 0
    """Times the placed model's loss was compared with that of documents one by one."""
    self_test_difference: float = 0.0
    """Largest difference found then, nats per token."""
    first_loss: float | None = None
    """First logged training loss, nats per token."""
    last_loss: float | None = None
    """Newest logged training loss, a mean over the steps since the one before."""
    base_validation_loss: float | None = None
    """Validation loss before the first step, nats per token; None in states of versions that did not look."""
    validation_loss: float | None = None
    """Newest validation loss."""
    propagated_rows: tuple[int, ...] = ()
    """Prompts with a label whose backward pass ended at each decoder layer, counted as it ran; empty for other rows."""
    peak_flops: float = 0.0
    """Peak rate MFU is measured against, FLOP/s of one worker."""
    train_s: float = 0.0
    """Seconds spent in steps, over all attempts."""
    plan_sha256: str = ""
    """The plan being trained."""
    corpus_sha256: str = ""
    """The token store being read."""

    @property
    def mean_workers(self) -> float:
        """Workers over all steps since their number was noted; 0 when it was not, or nothing was trained since."""
        ends = [start for start, _ in self.worlds[1:]] + [self.step]
        steps = [(end - start, workers) for (start, workers), end in zip(self.worlds, ends)]
        total = sum(count for count, _ in steps)
        return sum(count * workers for count, workers in steps) / total if total else 0.0

    def mean_window_loss(self) -> float:
        """Mean loss since the last log line; steps that were left out as not finite do not count."""
        finite = [loss for loss in self.window_losses if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    def count_frozen_check(self, seconds: float) -> TrainState:
        """One more time the frozen tensors were found unchanged."""
        update = {"frozen_checks": self.frozen_checks + 1, "frozen_check_s": self.frozen_check_s + seconds}
        return self.model_copy(update=update)

    def summarise_proof(self) -> dict[str, int | float | str]:
        """What shows that the plan was obeyed, by name."""
        proof: dict[str, int | float | str] = {**self.gradient_coverage, "coverage_checks": self.coverage_checks}
        if self.frozen_checksum:
            proof["frozen_checksum"] = self.frozen_checksum
            proof["frozen_checks"] = self.frozen_checks
            proof["frozen_check_share_of_training"] = round(self.frozen_check_s / max(self.train_s, 1e-9), 6)
        if self.loss_recipe:
            proof["loss_recipe"] = self.loss_recipe
            proof["self_tests"] = self.self_tests
            proof["self_test_difference"] = float(f"{self.self_test_difference:.3g}")
        return proof

    @classmethod
    def parse(cls, values: dict[str, Any]) -> TrainState:
        """Reads the state a checkpoint carries.

        Raises:
            CheckpointError: Naming the first field that is not of its type.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise CheckpointError(f"its {STATE_NAME} is not a training state ({describe_fault(error)})") from None

    def check_same_run(self, other: dict[str, Any]) -> TrainState:
        """Returns the state a checkpoint carries.

        Raises:
            CheckpointError: When it is none, or of another plan or corpus.
        """
        loaded = TrainState.parse(other)
        for field in ("plan_sha256", "corpus_sha256"):
            if getattr(loaded, field) != getattr(self, field):
                raise CheckpointError(
                    f"checkpoint at step {loaded.step}: its {field} is {getattr(loaded, field)[:12]},"
                    f" this run has {getattr(self, field)[:12]}"
                )
        return loaded
