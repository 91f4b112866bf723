"""How a model's loss over documents is computed exactly: what its self-test found, and what a run's checkpoints are bound to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Rows = Literal["packed", "reset", "alone", "whole"]
"""`packed`: documents share rows, told apart by positions that restart; `reset`: by the starts of documents besides, for
layers that carry state; `alone`: one document per row, padded at its end; `whole`: no document is told from the next,
which no self-test finds: it is asked for."""
ROWS_TEXT = {
    "packed": "packed rows",
    "reset": "packed rows with the starts of documents given",
    "alone": "one document per row",
    "whole": "rows as one text each",
}
"""In words."""
LOSS_BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}
"""How far two ways to compute one loss per token may lie apart, relative to the larger of 1 and the loss, by the dtype of the
products."""


@dataclass(frozen=True)
class HeadForm:
    """How logits come from the states that enter the head."""

    kind: Literal["linear", "own"] = "linear"
    """`linear`: softcap * tanh(factor * (states @ weight.T + bias) / softcap); `own`: only the model's own code knows."""
    factor: float = 1.0
    """What the head's output is multiplied by."""
    softcap: float | None = None
    """Bound of the logits; None where there is none."""


@dataclass(frozen=True)
class LossRecipe:
    """One rung of the ladder of `the self-test`."""

    rows: Rows = "packed"
    """How documents are told apart."""
    attention: Literal["any", "eager"] = "any"
    """`eager`: only the model's own attention code computes what the model means."""
    head: HeadForm = field(default_factory=HeadForm)
    """How logits come from hidden states."""

    @property
    def text(self) -> str:
        """The recipe in one line; equal for equal losses."""
        attention = "any attention" if self.attention == "any" else "plain attention"
        parts = [ROWS_TEXT[self.rows], attention, "linear head" if self.head.kind == "linear" else "its own head"]
        if self.head.factor != 1.0:
            parts.append(f"logits times {self.head.factor:g}")
        if self.head.softcap is not None:
            parts.append(f"logits capped at {self.head.softcap:g}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LossRecipe:
        """The recipe that `to_json` wrote."""
        return cls(values["rows"], values["attention"], HeadForm(**values["head"]))
