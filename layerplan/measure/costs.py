"""FLOPs of measurements, by the cost model that plans are priced with."""

from __future__ import annotations

from layerplan.config.measure import MeasureConfig, Measurement
from layerplan.plan.cost import predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan


def predict_flops(
    name: Measurement, shape: ModelShape, model: ModelIdentity, config: MeasureConfig, num_tokens: int
) -> float:
    """FLOPs of a measurement that reads text.

    Args:
        name: Of the measurement.
        shape: Sizes of the model.
        model: Which it is.
        config: Rows and positions.
        num_tokens: Tokens that pass the model.
    """
    full = make_full_plan(model, shape)
    if name == "pilot":
        return predict_cost(full, shape, seq_len=config.seq_len).total_flops * num_tokens
    cost = predict_cost(_train_layers(full), shape, seq_len=config.seq_len)
    if name in ("gradient_norm", "fisher"):
        return cost.total_flops * num_tokens
    flops = cost.forward_flops * num_tokens
    if name == "tuned_lens_gain":
        flops += _price_lens(shape, config)
    return flops


def _train_layers(full: FreezePlan) -> FreezePlan:
    """Gradients of the layers alone, as the norms ask for."""
    frozen = {"train_embeddings": False, "train_final_norm": False, "train_lm_head": False}
    tied = "untied" if full.tied == "untied" else "frozen"
    return full.model_copy(update={"plan_type": "explicit", "tied": tied, **frozen})


def _price_lens(shape: ModelShape, config: MeasureConfig) -> float:
    """Reading every layer at every asked position, and one normal matrix and solve for every layer and fold."""
    width = shape.hidden_size
    fitted = config.num_rows / 2 * config.seq_len
    per_fit = 4.0 * fitted * width**2 + width**3 / 3 + 4.0 * width**3
    reads = (shape.num_layers + 1) * config.lens_positions * 2.0 * (shape.head_matrix_params + width**2)
    return reads + 2 * shape.num_layers * per_fit
