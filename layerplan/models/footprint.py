"""What a process that runs a model asks of its node's memory, so that no two share a node that holds one of them."""

from __future__ import annotations

from layerplan.errors import ModelError
from layerplan.models.ref import ModelRef
from layerplan.plan.memory import estimate_inference_memory


def estimate_actor_memory(
    model: ModelRef, dtype: str, *, num_gpus: float, num_logits: int, cache_bytes: float = 0.0
) -> float:
    """Bytes an actor asks for; 0 on a GPU, whose number bounds the actors of a node, and where the sizes are not known.

    Args:
        model: What the actor loads.
        dtype: `float32`, `bfloat16` or `auto`, which is float32 here.
        num_gpus: Of the actor.
        num_logits: Held at once.
        cache_bytes: Of keys and values.
    """
    if num_gpus > 0:
        return 0.0
    try:
        num_params = model.num_params()
    except ModelError:  # whoever loads the model says what it lacks
        return 0.0
    return estimate_inference_memory(num_params, dtype, num_logits=num_logits, cache_bytes=cache_bytes)
