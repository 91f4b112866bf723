"""Model types of ours, which transformers learns of when a config names one: that needs no torch before."""

from __future__ import annotations

from importlib import import_module

HYBRID_TYPE = "layerplan_hybrid"
"""`model_type` of models whose layers are of several families."""
HYBRID_CLASS = "HybridForCausalLM"
"""Their class, as `architectures` of their config names it."""
_MODULES = {HYBRID_TYPE: "layerplan.models.hybrid"}


def make_known(model_type: str) -> None:
    """Registers a model type of ours with transformers' Auto classes; nothing for any other, or when it is done."""
    if model_type in _MODULES:
        import_module(_MODULES[model_type])
