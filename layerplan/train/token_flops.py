"""FLOPs per token of a run's rows, which MFU is measured with: of a plan, or of prompts by their start layers."""

from __future__ import annotations

from layerplan.corpus.manifest import Manifest
from layerplan.plan.cost import predict_cost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.start_cost import count_row_flops
from layerplan.train.request import LabelOptions


def predict_token_flops(
    plan: FreezePlan, shape: ModelShape, manifest: Manifest, labels: LabelOptions | None = None
) -> float:
    """Forward and backward FLOPs per token of a store's rows under a plan."""
    if manifest.labels is None:
        return predict_cost(plan, shape, seq_len=manifest.seq_len).total_flops
    return count_row_flops(
        manifest.labels.start_layers,
        plan,
        shape,
        seq_len=max(1, round(manifest.num_tokens / manifest.num_rows)),
        trains_alone=labels is not None and labels.trains_alone,
    )
