"""layerplan measures a model's layers, plans what to freeze, trains the plan on Ray and judges the result.

What this module offers is imported when it is used: reading a config or a plan needs no torch and no Ray.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_OFFERED = {
    "RunConfig": "layerplan.config.run",
    "load_config": "layerplan.config.load",
    "ModelRef": "layerplan.models.ref",
    "LayerProfile": "layerplan.plan.layer_profile",
    "FreezePlan": "layerplan.plan.freeze_plan",
    "make_plan": "layerplan.plan.policies",
    "apply_plan": "layerplan.models.freezing",
    "plan_callback": "layerplan.models.trainer_callback",
    "build_token_store": "layerplan.corpus.build",
    "trace_model": "layerplan.pipeline.api",
    "evaluate": "layerplan.pipeline.api",
    "compare": "layerplan.pipeline.compare",
    "run": "layerplan.pipeline.api",
}

__all__ = ["__version__", *_OFFERED]

if TYPE_CHECKING:
    from layerplan.config.load import load_config as load_config
    from layerplan.config.run import RunConfig as RunConfig
    from layerplan.models.ref import ModelRef as ModelRef
    from layerplan.plan.freeze_plan import FreezePlan as FreezePlan
    from layerplan.plan.layer_profile import LayerProfile as LayerProfile
    from layerplan.plan.policies import make_plan as make_plan


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module 'layerplan' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
    return getattr(import_module(_OFFERED[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# a worker of a run, told by its command: Ray imports the package there before anything runs
if "LAYERPLAN_LOG_LEVEL" in os.environ:
    from layerplan.log import set_up_worker

    set_up_worker()
