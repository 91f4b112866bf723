"""Where documents start in a packed row, in the arguments by which layers that carry state take it.

`transformers` has two vocabularies for it, those of the kernels: the index of the document of each token (`seq_idx`), and
the number of tokens before each document (`cu_seq_lens_q`). Which of them a model knows, its forward pass declares,
by name or by the typed dictionary of its keyword arguments. That it obeys them is not known from that: the PyTorch
stand-ins of most kernels take them and do not look. The self-test tells.
"""

from __future__ import annotations

import inspect
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ARGUMENTS = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def find_start_arguments(model: nn.Module) -> tuple[str, ...]:
    """Those arguments for the starts of documents that the model's forward pass declares."""
    try:
        signature = inspect.signature(model.forward, eval_str=True)
    except NameError:  # an annotation that only a type checker can read
        signature = inspect.signature(model.forward)
    declared = set(signature.parameters)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            declared.update(*(getattr(each, "__annotations__", {}) for each in get_args(parameter.annotation)))
    return tuple(name for name in _ARGUMENTS if name in declared)


def mark_starts(names: tuple[str, ...], position_ids_1T: Tensor) -> dict[str, Any]:
    """The arguments' values for one packed row.

    Args:
        names: From `find_start_arguments`.
        position_ids_1T: Positions that restart at every document.
    """
    is_start = position_ids_1T == 0
    starts = is_start[0].nonzero()[:, 0]
    before = F.pad(starts, (0, 1), value=position_ids_1T.shape[1]).to(torch.int32)
    values: dict[str, Any] = {"seq_idx": (is_start.cumsum(-1) - 1).to(torch.int32)}
    values |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), before)
    if {"max_length_q", "max_length_k"} & set(names):
        values |= dict.fromkeys(("max_length_q", "max_length_k"), int(position_ids_1T.max()) + 1)
    return {name: values[name] for name in names}
