"""A model on the meta device: every module and shape, no value and no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerplan.errors import ModelError, first_line

FEW_NUMBERS = 2**22
"""A tensor of no more numbers than this has its own place in memory while a hollow model runs."""


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


@contextmanager
def hollow_values(model: nn.Module) -> Iterator[None]:
    """Lets a model on the meta device run on a CPU for a while: all parameters show the same few random numbers.

    What is computed means nothing; which modules and parameters take part does. Buffers must have their values.
    """
    places = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    layouts = {parameter: _lay_out(parameter.shape) for _, _, parameter in places}
    size = max((sum((n - 1) * step for n, step in zip(*each, strict=True)) + 1 for each in layouts.values()), default=1)
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.05
    hollow = {parameter: _make_hollow(parameter, numbers, *each) for parameter, each in layouts.items()}
    for module, key, parameter in places:
        module._parameters[key] = hollow[parameter]
    try:
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter


class ValuesAreTrue(TorchDispatchMode):
    """Answers a model that looks at a value of a meta tensor, as whether a mask is all ones: yes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every operation as it is but the one that makes a number of a tensor."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def _lay_out(shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes, and strides by which a large tensor fits into few numbers: its rows overlap.

    Of stacked matrices each is whole, as kernels for experts want them, and they overlap.
    """
    sizes = tuple(shape)
    strides = torch.empty(shape, device="meta").stride()
    if shape.numel() <= FEW_NUMBERS or len(shape) < 2:
        return sizes, strides
    kept = 1 if len(shape) == 2 else 2
    return sizes, (*(1 for _ in sizes[:-kept]), *strides[-kept:])


def _make_hollow(
    parameter: nn.Parameter, numbers: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]
) -> nn.Parameter:
    value = numbers.to(parameter.dtype).as_strided(sizes, strides)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def explain_load_error(name: str, error: Exception) -> str:
    """One line for what a library raised while building or loading a model."""
    what = "needs a package that is not installed" if isinstance(error, ImportError) else "cannot be loaded"
    return f"model.name={name}: {what} ({first_line(error)})"
