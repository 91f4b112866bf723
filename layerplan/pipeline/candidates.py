"""The plans a boundary sweep tries, from config and sizes alone."""

from __future__ import annotations

from typing import Any

from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.config.run import RunConfig
from layerplan.config.sweep import SweepConfig
from layerplan.errors import ConfigError, PlanError
from layerplan.plan.boundary import check_boundary, compute_boundary
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.run_folder import BOUNDARY_PREFIX

DEFAULT_SWEEP = SweepConfig(split_ratios=[1 / 3, 1 / 2, 2 / 3])
END_OPTIONS = {"tied": None, "train_embeddings": False, "train_final_norm": False, "train_lm_head": False}
"""What the config's plan says of the model's ends holds for every trial; else this."""


def make_candidates(
    config: RunConfig, sweep: SweepConfig, model: ModelIdentity, shape: ModelShape
) -> dict[int, FreezePlan]:
    """One plan per distinct boundary, in order.

    Raises:
        ConfigError: When a boundary does not fit the model.
    """
    ratios, given = sweep.split_ratios or [], sweep.boundaries or []
    boundaries = sorted({*(compute_boundary(ratio, shape.num_layers) for ratio in ratios), *given})
    ends: dict[str, Any] = {name: getattr(config.plan, name, default) for name, default in END_OPTIONS.items()}
    kind = FreezeDeepPlanConfig if sweep.freeze == "deep" else FreezeShallowPlanConfig
    plans = {}
    for boundary in boundaries:
        try:
            check_boundary(boundary, shape.num_layers, "sweep.boundaries")
        except PlanError as error:
            raise ConfigError(str(error)) from None
        plans[boundary] = make_plan(
            kind(boundary=boundary, **ends), model=model, shape=shape, seq_len=config.corpus.seq_len
        )
    return plans


def name_trial(boundary: int) -> str:
    """Folder of a trial below the sweep, and its name everywhere."""
    return f"{BOUNDARY_PREFIX}{boundary:02d}"
