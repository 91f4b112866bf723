"""What a plan costs, in FLOPs and bytes, before anything is loaded.

The direction of a plan matters. Backward stops at the lowest trainable parameter: a frozen *prefix* runs forward only.
A frozen *suffix* still carries the gradient of its input down to what trains below, so it saves only its weight
gradients. A trained input embedding pulls the gradient through every layer. FLOPs count a multiply-add as two and
attention causally, (T + 1) / 2 keys per query on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from layerplan.config.base import StrictModel
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape

BYTES_PER_TRAINED_PARAM = 14
"""bf16 weight and gradient, fp32 master and two moments, the gradient counted once."""
BYTES_PER_FROZEN_PARAM = 2
GIB = 2**30


class PlanCost(StrictModel):
    """Predicted cost of one plan; FLOPs are per token."""

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


def predict_cost(plan: FreezePlan, shape: ModelShape, *, seq_len: int) -> PlanCost:
    """Predicts the cost of a plan for rows of `seq_len` tokens."""
    trained = set(plan.trainable_layers)
    projections = 2.0 * (shape.attention_params + shape.mlp_params)
    attention = 4.0 * shape.num_attention_heads * shape.head_dim * (seq_len + 1) / 2
    head = 2.0 * shape.embedding_params
    first = _first_gradient_layer(plan, shape)
    carrying = range(first, shape.num_layers)
    trainable = count_trainable_params(plan, shape)
    return PlanCost(
        trainable_params=trainable,
        total_params=shape.total_params,
        forward_flops=shape.num_layers * (projections + attention) + head,
        backward_activation_flops=sum(
            _input_gradient_flops(layer, first, plan, shape, projections) + 2 * attention for layer in carrying
        )
        + (head if _gradient_below_head(plan, first, shape) else 0.0),
        backward_weight_flops=len(trained) * projections + (head if _trains_head(plan) else 0.0),
        first_gradient_layer=first,
        weight_and_optimizer_bytes=BYTES_PER_TRAINED_PARAM * trainable
        + BYTES_PER_FROZEN_PARAM * (shape.total_params - trainable),
        checkpoint_bytes=12 * trainable,
    )


def count_trainable_params(plan: FreezePlan, shape: ModelShape) -> int:
    """Parameters that train under the plan; a tied matrix counts once."""
    if plan.plan_type == "full":
        return shape.total_params
    embeddings = shape.embedding_params if plan.train_embeddings or plan.tied == "head_only" else 0
    head = shape.embedding_params if plan.train_lm_head and not shape.is_tied else 0
    norm = shape.hidden_size if plan.train_final_norm else 0
    return len(plan.trainable_layers) * shape.layer_params + embeddings + head + norm


def explain_cost(plan: FreezePlan, shape: ModelShape, cost: PlanCost, full: PlanCost) -> str:
    """One sentence on why the plan is or is not cheaper than training everything."""
    share = cost.total_flops / full.total_flops
    if cost.first_gradient_layer == 0 and plan.train_embeddings and plan.frozen_layers:
        why = "the trained input embedding pulls the gradient through every layer, so frozen layers save weight gradients only"
    elif cost.first_gradient_layer == 0 and plan.frozen_layers:
        why = (
            "layer 0 trains, so the gradient crosses every frozen layer above it; only their weight gradients are saved"
        )
    elif cost.first_gradient_layer > 0:
        why = f"backward stops at layer {cost.first_gradient_layer}; the layers below it run forward only"
    else:
        why = "everything trains"
    return f"{share:.1%} of the FLOPs of full training: {why}."


def render_cost_table(costs: Mapping[str, PlanCost]) -> str:
    """A text table of plans by name, each beside the first one."""
    names: Sequence[str] = list(costs)
    reference = costs[names[0]]
    lines = [
        f"{'plan':<22}{'trainable':>12}{'GFLOP/token':>13}{'of ' + names[0]:>10}{'memory GiB':>12}{'ckpt GiB':>10}"
    ]
    for name in names:
        cost = costs[name]
        lines.append(
            f"{name:<22}{cost.trainable_params / 1e6:>10.1f} M{cost.total_flops / 1e9:>13.3f}"
            f"{cost.total_flops / reference.total_flops:>10.3f}"
            f"{cost.weight_and_optimizer_bytes / GIB:>12.2f}{cost.checkpoint_bytes / GIB:>10.2f}"
        )
    return "\n".join(lines)


def _first_gradient_layer(plan: FreezePlan, shape: ModelShape) -> int:
    if plan.train_embeddings:
        return 0
    return min(plan.trainable_layers, default=shape.num_layers)


def _trains_head(plan: FreezePlan) -> bool:
    return plan.train_lm_head or plan.tied in ("trained", "head_only")


def _gradient_below_head(plan: FreezePlan, first: int, shape: ModelShape) -> bool:
    return first < shape.num_layers or plan.train_final_norm or plan.train_embeddings


def _input_gradient_flops(layer: int, first: int, plan: FreezePlan, shape: ModelShape, projections: float) -> float:
    """Activation gradients of one layer's matrices; the lowest one needs none below its first projections."""
    if layer > first or plan.train_embeddings:
        return projections
    into_queries_keys_values = 2.0 * shape.hidden_size * shape.head_dim
    return projections - into_queries_keys_values * (shape.num_attention_heads + 2 * shape.num_key_value_heads)
