"""What a plan is predicted to cost, as values; a plan carries them, `layerplan/plan/cost.py` computes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
)

from layerplan.config.base import StrictModel


class PlanCost(StrictModel):
    """Predicted cost of one plan; FLOPs are per token unless named otherwise."""

    trainable_params: int = Field(ge=0)
    """Parameters that train; a tied matrix counts once."""
    total_params: int = Field(ge=1)
    """All parameters."""
    forward_flops: float
    """Forward pass."""
    backward_activation_flops: float
    """Gradients of activations."""
    backward_weight_flops: float
    """Gradients of weights."""
    optimizer_flops_per_step: float = 0.0
    """Elementwise work of one AdamW update, whatever the batch."""
    first_gradient_layer: int
    """Lowest layer index that backward enters; num_layers when it stops above all of them."""
    weight_and_optimizer_bytes: int
    """Weights, gradients, masters and moments on one unsharded worker."""
    checkpoint_bytes: int
    """fp32 masters and moments of what trains."""

    @property
    def total_flops(self) -> float:
        """Forward and backward FLOPs per token."""
        return self.forward_flops + self.backward_activation_flops + self.backward_weight_flops

    @model_serializer(mode="wrap")
    def _as_it_was_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without fields that an older version did not write, so that a sealed plan keeps its hash."""
        return {name: value for name, value in dump(self).items() if name in self.model_fields_set}


class PredictedCost(StrictModel):
    """Cost of a plan beside that of training everything, for rows of one length."""

    seq_len: int = Field(ge=1)
    """Tokens per row."""
    plan: PlanCost
    """Of the plan."""
    full: PlanCost
    """Of training everything."""

    @property
    def flops_share(self) -> float:
        """FLOPs of the plan, of those of training everything."""
        return self.plan.total_flops / self.full.total_flops


def _take_empty(value: Any) -> Any:
    return None if value == {} else value


NoCost = Annotated[
    None,
    BeforeValidator(_take_empty),
    WithJsonSchema({"type": "object", "maxProperties": 0}),
]
"""Of a plan that nobody priced; an empty object in its file."""
