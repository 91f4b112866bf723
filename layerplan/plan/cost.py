"""What a plan costs, in FLOPs and bytes, before anything is loaded.

The direction of a plan matters. Backward stops at the lowest trainable parameter: a frozen *prefix* runs forward only.
A frozen *suffix* still carries the gradient of its input down to what trains below it, so it saves only its weight
gradients. A trained input embedding pulls the gradient through every layer. FLOPs count a multiply-add as two and
attention causally, (T + 1) / 2 keys per query on average or those of its window, unless told otherwise. Of experts the
active ones count in FLOPs and all of them in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import LayerShape, ModelShape
from layerplan.plan.plan_cost import PlanCost
from layerplan.plan.trained_part import (
    count_trained_layer_params,
    is_mixing_on_path,
    path_matrix_params,
    trained_matrix_params,
)

BYTES_PER_TRAINED_PARAM = 14
"""bf16 weight and gradient, fp32 master and two moments, the gradient counted once."""
BYTES_PER_FROZEN_PARAM = 2
OPTIMIZER_FLOPS_PER_PARAM = 16
"""AdamW: two moments, their corrections, the decay and the update, element by element."""
GIB = 2**30
ASSUMED_FLOPS_PER_S = {True: 790e12 * 0.5, False: 50e9}
"""Per worker, with a GPU and without: half of an H200's bf16 matrix rate, or one CPU core."""


def predict_cost(
    plan: FreezePlan, shape: ModelShape, *, seq_len: int, causal: bool = True, input_requires_grad: bool = False
) -> PlanCost:
    """Predicts the cost of a plan for rows of `seq_len` tokens.

    Args:
        plan: What trains; of a plan with phases the FLOPs are means over its steps.
        shape: Sizes of the model.
        seq_len: Tokens per row.
        causal: Count the keys a causal kernel reads; False counts the whole square, as eager attention computes it.
        input_requires_grad: Whether something asks for the gradient of the embeddings' output, as the helper
            `enable_input_require_grads` of transformers does; it cancels what a frozen prefix saves.
    """
    if plan.phases:
        return _average_phases(plan, shape, seq_len=seq_len, causal=causal)
    head, other = 2.0 * shape.head_matrix_params, 2.0 * shape.other_matrix_params
    first = 0 if input_requires_grad else _first_gradient_layer(plan, shape)
    forward = backward_activations = backward_weights = 0.0
    for layer in range(shape.num_layers):
        matrices = 2.0 * shape.layers[layer].matrix_params
        mixing = _mixing_flops(shape.layers[layer], seq_len, causal=causal)
        forward += matrices + mixing
        if layer >= first:
            backward_activations += _input_gradient_flops(layer, first, plan, shape)
            backward_activations += 2 * mixing if _mixing_needs_gradient(layer, first, plan, shape) else 0.0
        backward_weights += 2.0 * trained_matrix_params(plan, shape, layer)
    reaches_below_head = first < shape.num_layers or plan.train_final_norm or plan.train_embeddings
    if plan.trains_everything:
        backward_activations, backward_weights = backward_activations + other, backward_weights + other
    trainable = count_trainable_params(plan, shape)
    return PlanCost(
        trainable_params=trainable,
        total_params=shape.total_params,
        forward_flops=forward + head + other,
        backward_activation_flops=backward_activations + (head if reaches_below_head else 0.0),
        backward_weight_flops=backward_weights + (head if trains_head(plan) else 0.0),
        optimizer_flops_per_step=OPTIMIZER_FLOPS_PER_PARAM * trainable,
        first_gradient_layer=first,
        weight_and_optimizer_bytes=BYTES_PER_TRAINED_PARAM * trainable
        + BYTES_PER_FROZEN_PARAM * (shape.total_params - trainable),
        checkpoint_bytes=12 * trainable,
    )


def count_trainable_params(plan: FreezePlan, shape: ModelShape) -> int:
    """Parameters that train under the plan; a tied matrix counts once, what text does not reach not at all."""
    if plan.trains_everything:
        return shape.total_params - shape.unreached_params
    embeddings = shape.embedding_params if plan.train_embeddings or plan.tied == "head_only" else 0
    head = shape.head_params if plan.train_lm_head else 0
    norm = shape.final_norm_params if plan.train_final_norm else 0
    return count_trained_layer_params(plan, shape) + embeddings + head + norm


def explain_cost(plan: FreezePlan, shape: ModelShape, cost: PlanCost, full: PlanCost) -> str:
    """One sentence on why the plan is or is not cheaper than training everything."""
    share = cost.total_flops / full.total_flops
    is_partial = bool(plan.frozen_layers or plan.trainable_modules)
    if cost.first_gradient_layer == 0 and plan.train_embeddings and is_partial:
        why = "the trained input embedding pulls the gradient through every layer, so frozen layers save weight gradients only"
    elif plan.trainable_modules:
        why = (
            f"backward stops in layer {cost.first_gradient_layer}, and the gradient crosses every frozen module above what"
            " trains first; only their weight gradients are saved"
        )
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
        f"{'plan':<22}{'trainable':>12}{'GFLOP/token':>13}{'of ' + names[0]:>10}{'weights+opt GiB':>17}{'ckpt GiB':>10}"
    ]
    for name in names:
        cost = costs[name]
        lines.append(
            f"{name:<22}{cost.trainable_params / 1e6:>10.1f} M{cost.total_flops / 1e9:>13.3f}"
            f"{cost.total_flops / reference.total_flops:>10.3f}"
            f"{cost.weight_and_optimizer_bytes / GIB:>17.2f}{cost.checkpoint_bytes / GIB:>10.2f}"
        )
    return "\n".join(lines)


def _average_phases(plan: FreezePlan, shape: ModelShape, *, seq_len: int, causal: bool) -> PlanCost:
    """FLOPs as means over the steps of the run, memory of the largest phase, and what trains at some time.

    A checkpoint holds float32 weights of all of that; moments of the phase at hand, or of all where the plan keeps them.
    """
    starts = [phase.start_step for phase in plan.phases]
    ends = [*starts[1:], plan.planned_steps or starts[-1] + 1]
    steps = [max(0, end - start) for start, end in zip(starts, ends, strict=True)]
    costs = [predict_cost(plan.at_step(start), shape, seq_len=seq_len, causal=causal) for start in starts]

    def mean(name: str) -> float:
        return sum(getattr(cost, name) * count for cost, count in zip(costs, steps, strict=True)) / max(1, sum(steps))

    averaged = ("forward_flops", "backward_activation_flops", "backward_weight_flops", "optimizer_flops_per_step")
    largest = max(costs, key=lambda cost: cost.trainable_params)
    lowest = min(cost.first_gradient_layer for cost in costs)
    trainable = count_trainable_params(plan, shape)
    with_moments = trainable if plan.optimizer_state == "keep" else largest.trainable_params
    update = {name: mean(name) for name in averaged} | {
        "first_gradient_layer": lowest,
        "trainable_params": trainable,
        "checkpoint_bytes": 4 * trainable + 8 * with_moments,
    }
    return largest.model_copy(update=update)


def _first_gradient_layer(plan: FreezePlan, shape: ModelShape) -> int:
    if plan.train_embeddings:
        return 0
    return min(plan.trainable_layers, default=shape.num_layers)


def trains_head(plan: FreezePlan) -> bool:
    """Whether the matrix that gives the logits trains, of its own or tied to the embeddings."""
    return plan.train_lm_head or plan.tied in ("trained", "head_only")


def _mixing_flops(layer: LayerShape, seq_len: int, *, causal: bool) -> float:
    """What mixes positions: attention scores and values, and scans whose work does not grow with the row."""
    return 2.0 * layer.attention_width * layer.mean_keys(seq_len, causal=causal) + layer.scan_flops


def _input_gradient_flops(layer: int, first: int, plan: FreezePlan, shape: ModelShape) -> float:
    """Activation gradients of one layer's matrices.

    Below the lowest trained layer nothing needs a gradient, so its first matrices give none, unless a norm that trains
    stands before them.
    """
    sizes = shape.layers[layer]
    if not _is_lowest(layer, first, plan):
        return 2.0 * sizes.matrix_params
    if layer in plan.trainable_modules:
        return 2.0 * path_matrix_params(plan, shape, layer)
    return 2.0 * (sizes.matrix_params - sizes.first_matrix_params)


def _mixing_needs_gradient(layer: int, first: int, plan: FreezePlan, shape: ModelShape) -> bool:
    is_partial = _is_lowest(layer, first, plan) and layer in plan.trainable_modules
    return not is_partial or is_mixing_on_path(plan, shape, layer)


def _is_lowest(layer: int, first: int, plan: FreezePlan) -> bool:
    """Whether backward ends inside this layer, at the first of what trains in it."""
    return layer == first and first in plan.trainable_layers and not plan.train_embeddings
