"""The engine that a spec means, loaded; a library is imported only when its engine is."""

from __future__ import annotations

from eval.engine import Engine, EngineSpec
from layerplan.models.cores import find_threads, use_cores


def open_engine(spec: EngineSpec) -> Engine:
    """Loads the model with the spec's backend.

    Raises:
        EvaluationError: When vLLM cannot start.
        ModelError: When transformers cannot load the model.
    """
    use_cores(find_threads(spec.num_threads, spec.num_engines))
    if spec.backend == "vllm":
        from eval.generation import VllmEngine

        return VllmEngine(spec)
    from eval.logits import TransformersEngine

    return TransformersEngine(spec)
