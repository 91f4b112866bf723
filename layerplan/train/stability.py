"""What to do with a step whose loss or gradient went wrong: a pure decision over the recent losses."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from layerplan.config.train import StabilityConfig

Action = Literal["apply", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class StepDecision:
    """What happens to the update of one step, and why; `event` is empty when nothing is out of the ordinary."""

    action: Action
    event: str = ""
    message: str = ""


@dataclass
class StabilityMonitor:
    """Judges each step; every rank holds one and, fed the same numbers, decides the same."""

    config: StabilityConfig
    recent: deque[float] = field(default_factory=deque)
    spikes_in_a_row: int = 0
    """After a window full of them the loss has another level, not a spike."""

    @property
    def looks_first(self) -> bool:
        """Whether the update of a step depends on its loss, finite or not; what is not finite the device leaves out itself."""
        return self.config.on_spike in ("skip", "rollback", "stop")

    def judge(self, step: int, loss: float, grad_norm: float, *, skipped: int, rollbacks: int) -> StepDecision:
        """Decides on the step and remembers its loss.

        Args:
            step: 1-based number of the step.
            loss: Global mean loss.
            grad_norm: Norm before clipping.
            skipped: Steps left out so far because they were not finite.
            rollbacks: Returns to a checkpoint so far.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            event, policy = "nonfinite", str(self.config.on_nonfinite)
            message = f"step {step}: loss {loss:.4g} or gradient norm {grad_norm:.4g} is not finite"
        elif self._is_spike(loss):
            self.spikes_in_a_row += 1
            if self.spikes_in_a_row >= self.config.spike_window:
                return self._accept_level(step, loss)
            event, policy = "loss_spike", self.config.on_spike
            message = (
                f"step {step}: loss {loss:.4f} is over {self.config.spike_sigmas:g} deviations above its recent mean"
            )
        else:
            self.spikes_in_a_row = 0
            self._remember(loss)
            return StepDecision("apply")
        return self._apply_policy(event, policy, message, skipped, rollbacks)

    def forget(self) -> None:
        """Starts over after a return to a checkpoint, or at another level of the loss."""
        self.recent.clear()
        self.spikes_in_a_row = 0

    def _accept_level(self, step: int, loss: float) -> StepDecision:
        message = f"step {step}: loss {loss:.4f} ends {self.spikes_in_a_row} steps in a row above their recent mean"
        self.forget()
        self._remember(loss)
        return StepDecision("apply", "loss_level", f"{message}; it is taken for the loss's level from here on")

    def _apply_policy(self, event: str, policy: str, message: str, skipped: int, rollbacks: int) -> StepDecision:
        if policy in ("log", "off"):
            return StepDecision("apply", event, f"{message}; its update is applied")
        if policy == "skip" and event == "nonfinite" and skipped + 1 > self.config.max_nonfinite:
            policy = "stop"
            message += f"; max_nonfinite={self.config.max_nonfinite} steps were left out before it"
        if policy == "rollback" and rollbacks + 1 > self.config.max_rollbacks:
            policy = "stop"
            message += f"; max_rollbacks={self.config.max_rollbacks} are used up"
        if policy == "skip":
            count = f" ({skipped + 1} so far)" if event == "nonfinite" else ""
            return StepDecision("skip", event, f"{message}; its update is left out{count}")
        if policy == "rollback":
            return StepDecision(
                "rollback", event, f"{message}; returning to the last checkpoint ({rollbacks + 1} so far)"
            )
        return StepDecision("stop", event, f"{message}; stopping as train.stability says")

    def _is_spike(self, loss: float) -> bool:
        if self.config.on_spike == "off" or len(self.recent) < self.config.spike_window:
            return False
        mean = statistics.fmean(self.recent)
        deviation = statistics.pstdev(self.recent, mu=mean)
        # a floor, because a loss that has converged on one batch deviates by nothing
        return loss > mean + self.config.spike_sigmas * max(deviation, 0.01 * abs(mean))

    def _remember(self, loss: float) -> None:
        self.recent.append(loss)
        while len(self.recent) > self.config.spike_window:
            self.recent.popleft()
