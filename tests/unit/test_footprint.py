"""What a process that runs a model asks of its node: the weights in the width they are loaded in, and what stands beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerplan.models.footprint import estimate_actor_memory
from layerplan.models.ref import ModelRef
from tests.model_folders import save_tiny_base


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("auto", 4), ("bfloat16", 2)])
def test_an_actor_asks_for_the_weights_as_loaded_the_logits_the_cache_and_its_libraries(
    tmp_path: Path, dtype: str, width: int
) -> None:
    """The tensors that torch holds are the oracle, whatever dtype is stored; half a GiB is for libraries."""
    base = save_tiny_base(tmp_path, vocab_size=300)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    held = sum(parameter.numel() for parameter in model.parameters()) * width
    asked = estimate_actor_memory(ModelRef(str(base)), dtype, num_gpus=0, num_logits=1000, cache_bytes=7.0)
    assert asked == held + 1000 * (width + 4) + 7 + 2**29


def test_nothing_is_asked_for_on_a_gpu_nor_for_a_model_nobody_can_size(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path, vocab_size=300)
    assert estimate_actor_memory(ModelRef(str(base)), "auto", num_gpus=1, num_logits=0) == 0
    for path in base.glob("*.safetensors"):
        path.unlink()
    assert estimate_actor_memory(ModelRef(str(base)), "auto", num_gpus=0, num_logits=0) == 0
