"""A model on the meta device: every module and shape, no value and no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layerplan.errors import ModelError, first_line


def build_without_memory(config: Any, *, name: str, trust_remote_code: bool = False) -> nn.Module:
    """Builds the model that transformers makes of a config, in eval mode, its tied parameters tied.

    Raises:
        ModelError: When no causal language model can be built from it, naming the package when one is missing.
    """
    from transformers import AutoModelForCausalLM, initialization

    try:
        with torch.device("meta"), initialization.no_init_weights(), initialization.meta_device_safe_creation_ops():
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
            model.tie_weights(recompute_mapping=False)
    except Exception as error:  # the model's code, or its config's: anything can be raised
        raise ModelError(explain_load_error(name, error)) from None
    built: nn.Module = model.eval()
    return built


def explain_load_error(name: str, error: Exception) -> str:
    """One line for what a library raised while building or loading a model."""
    what = "needs a package that is not installed" if isinstance(error, ImportError) else "cannot be loaded"
    return f"model.name={name}: {what} ({first_line(error)})"
