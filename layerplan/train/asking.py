"""The model is asked about its loss in a Ray task, so that the driver neither loads model code nor holds weights."""

from __future__ import annotations

from typing import Any

import ray

from layerplan.errors import find_layerplan_error
from layerplan.log import set_up_worker
from layerplan.models.ref import ModelRef
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.ray_session import quiet_engines


def ask_in_task(model: ModelRef, *, seq_len: int) -> dict[str, Any] | None:
    """Asks a model how its loss is computed, in a process of its own on the cluster at hand.

    Returns:
        `SelfTestReport.to_json`, or None when the model's float32 weights do not fit into the node's memory: then the
        workers ask.

    Raises:
        ModelError: When it cannot be loaded, or its loss not be computed exactly.
    """
    task = ray.remote(num_cpus=1, max_retries=0)(_ask)
    try:
        report: dict[str, Any] | None = ray.get(task.remote(model, seq_len))
    except ray.exceptions.RayError as error:
        fault = find_layerplan_error(error)
        if fault is None:
            raise
        raise type(fault)(*fault.args) from None
    return report


def read_recipe(report: dict[str, Any]) -> LossRecipe:
    """The recipe in a report."""
    return LossRecipe.from_json(report["recipe"])


def _ask(model: ModelRef, seq_len: int) -> dict[str, Any] | None:
    from layerplan.train.loss_proof import ask_by_name

    set_up_worker()
    quiet_engines()
    model.fetch()
    report = ask_by_name(model, seq_len=seq_len)
    return None if report is None else report.to_json()
