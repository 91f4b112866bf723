"""What a layer keeps for its backward pass, counted by PyTorch's hooks on saved tensors, on tensors without memory.

Every layer is asked as it trains: frozen and trained, in both dtypes, with dropout, with experts in groups
(`layerplan/models/experts_probe.py`), and with attention by each kind of code (`layerplan/models/kept_attention.py`). Rows of
two lengths tell what grows with the square of a row. What all layers are given alike, as positions, is no layer's own.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from layerplan.models import attention_probe, experts_probe
from layerplan.models.kept_attention import BY_KERNEL, list_kept, make_output
from layerplan.plan.model_shape import AttentionKind, SavedBytes

DTYPES = ("float32", "bfloat16")

REST: Final = "rest"
Sizes = Mapping[AttentionKind | Literal["rest"], Sequence[int]]
"""Bytes of every tensor that is kept, in the order of the layer's code: what each kind of attention keeps, and `REST`."""
Passes = Mapping[tuple[str, bool], Sizes]
"""By dtype, and whether the layer trains."""


def measure_saved_bytes(
    forward: Callable[..., Any],
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    trained: Sequence[bool],
) -> dict[tuple[str, bool], Sizes]:
    """What is kept over the row at hand; parameters are not counted. Nothing of a layer whose code cannot train without values.

    Args:
        forward: The layer's forward pass.
        layer: On the meta device and in float32; it is left so.
        args: What it is called with; what depends on parameters requires a gradient.
        kwargs: Likewise.
        trained: Whether the layer trains, each asked for.
    """
    found: dict[tuple[str, bool], Sizes] = {}
    was_training = layer.training
    layer.train()
    try:
        for name in DTYPES:
            layer.to(getattr(torch, name))
            for each in trained:
                layer.requires_grad_(each)
                found[name, each] = _Pass(layer, getattr(torch, name), each).run(forward, args, kwargs)
    except Exception:  # the layer's own code
        return {}
    finally:
        layer.to(torch.float32).train(was_training)
    return found


def solve_saved_bytes(short: Passes, long: Passes, tokens: int) -> dict[str, dict[AttentionKind, SavedBytes]]:
    """Bytes per token and per pair of tokens, by dtype and kind of attention, from rows of `tokens` and of twice as many.

    Args:
        short: Of a frozen and of a trained layer.
        long: Of a frozen layer.
        tokens: Of the short row.
    """
    found: dict[str, dict[AttentionKind, SavedBytes]] = {}
    for name in DTYPES if short and long else ():
        frozen, trained = short[name, False], short[name, True]
        solved = {part: _solve(sizes, long[name, False][part], tokens) for part, sizes in frozen.items()}
        # inputs of matrices, which grow like the row
        more = {part: (sum(sizes) - sum(frozen[part])) / tokens for part, sizes in trained.items()}
        per_token, per_pair = solved[REST]
        attended: dict[AttentionKind, tuple[float, float]] = {
            part: grown for part, grown in solved.items() if part != REST
        }
        found[name] = {
            kind: SavedBytes(
                frozen=per_token + linear,
                trained=per_token + linear + more[REST] + (more.get("kernel", 0.0) if kind in BY_KERNEL else 0.0),
                per_pair=per_pair + squares,
            )
            for kind, (linear, squares) in (attended or {"kernel": (0.0, 0.0)}).items()
        }
    return found


def _solve(short: Sequence[int], long: Sequence[int], tokens: int) -> tuple[float, float]:
    """Bytes per token and per pair. What does not grow, as the state before the first chunk or a copy of weights, is left out."""
    if len(short) != len(long):  # a loop over positions, or chunks of which the first shares memory
        return sum(long) / (2 * tokens), 0.0
    per_token = per_pair = 0.0
    for once, twice in zip(short, long, strict=True):
        squares = max(0.0, (twice / 2 - once) / tokens**2)
        per_pair += squares
        per_token += max(0.0, (twice - once) / tokens - 3 * squares * tokens)
    return per_token, per_pair


@dataclass
class _Pass:
    """One forward pass."""

    layer: nn.Module
    dtype: torch.dtype
    trained: bool
    _own: set[int] = field(default_factory=set)
    """Storages of parameters and buffers."""
    _given: dict[int, bool] = field(default_factory=dict)
    """Storages of arguments beside the states, and whether they are this layer's alone: all have the same positions."""
    _kept: list[Tensor] = field(default_factory=list)
    _by_attention: list[dict[AttentionKind, list[Tensor]]] = field(default_factory=list)
    is_attending: bool = False
    """Whether attention is being asked what it keeps."""

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes:
        """Runs it and returns what is kept."""
        self._own = {_place(tensor) for tensor in (*self.layer.parameters(), *self.layer.buffers())}
        states, *args_left = args or (kwargs["hidden_states"],)
        named = {name: value for name, value in kwargs.items() if args or name != "hidden_states"}
        args_left, named = self._hand_over(args_left), {name: self._hand_over(value) for name, value in named.items()}
        states = states.detach().to(self.dtype).requires_grad_()
        given = (states, *args_left) if args else ()
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor),
            self._attending(),
            experts_probe.grouped(),
        ):
            forward(*given, **named, **({} if args else {"hidden_states": states}))
        kinds = dict.fromkeys(kind for call in self._by_attention for kind in call)
        rest = self._measure(self._kept, set())
        attended = {
            kind: [each for call in self._by_attention for each in call.get(kind, call["kernel"])] for kind in kinds
        }
        sizes: dict[AttentionKind | Literal["rest"], list[int]] = {REST: list(rest.values())}
        sizes |= {kind: list(self._measure(kept, set(rest)).values()) for kind, kept in attended.items()}
        return sizes

    def _hand_over(self, value: Any) -> Any:
        """An argument beside the states; what stands in a dictionary, as shared keys, is another layer's, and has a gradient."""
        is_shared = isinstance(value, dict | UserDict)

        def hand_over(tensor: Tensor) -> Tensor:
            wants = tensor.is_floating_point() and (is_shared or tensor.requires_grad)
            given = tensor.detach().to(self.dtype) if tensor.is_floating_point() else tensor
            self._given[_place(given)] = wants and not is_shared
            return given.requires_grad_() if wants else given

        return tree_map_only(Tensor, hand_over, dict(value) if is_shared else value)

    def _note(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor

    @contextmanager
    def _attending(self) -> Iterator[None]:
        attention_probe.on_attend = self.attend
        try:
            with _Intercepted(self):
                yield
        finally:
            attention_probe.on_attend = None

    def attend(
        self,
        module: nn.Module | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        asked: dict[str, Any],
    ) -> Tensor:
        """Notes what is kept, and hands on an output without values."""
        self.is_attending = True
        output = make_output(query, value)
        kept = list_kept(module, query, key, value, mask, output, asked, kernel_only=self.trained)
        self.is_attending = False
        self._by_attention.append(kept)
        attended: Tensor = _Attended.apply(query, key, value, output)
        return attended

    def _measure(self, kept: Sequence[Tensor], known: set[int]) -> dict[int, int]:
        """Bytes of each storage that is the layer's own and not known."""
        found: dict[int, int] = {}
        for tensor in kept:
            place = _place(tensor)
            if place not in self._own and place not in known and self._given.get(place, True):
                size = tensor.untyped_storage().nbytes()
                found[place] = min(size, tensor.nbytes) if place in self._given else size
        return found


class _Attended(torch.autograd.Function):
    """Hands on what attention gives and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """The output that was made for it."""
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """There are no values."""
        raise NotImplementedError("attention that only counts has no gradients")


class _Intercepted(TorchFunctionMode):
    """Attention that a layer calls without asking transformers which."""

    def __init__(self, counted: _Pass) -> None:
        super().__init__()
        self._counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs every function as it is but that one."""
        if func is torch.nn.functional.scaled_dot_product_attention and not self._counted.is_attending:
            return self._call(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *_: Any,
        enable_gqa: bool = False,
        **__: Any,
    ) -> Tensor:
        asked = {"dropout": dropout_p, "enable_gqa": enable_gqa}
        return self._counted.attend(None, query, key, value, attn_mask, asked)


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
