"""One model, prepared for tracing: hooks on its layers, and the lens that reads a residual stream as a prediction.

Shapes: B probes, T tokens, D hidden, V vocabulary, L layers. Padding is on the left, so `last` is position T-1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.errors import ModelError
from layerplan.models.causal_lm import find_decoder_parts

LENS_TOLERANCE = 1e-4


class LayerRunner:
    """Runs a decoder and exposes the residual stream after each block."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.parts = find_decoder_parts(model)
        self.num_layers = len(self.parts.layers)
        config: Any = model.config
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logits_scaling", None)
        if self.num_layers < 2:
            raise ModelError(f"{type(model).__name__}: has {self.num_layers} layer; tracing needs at least 2")

    def lens(self, hidden: Tensor) -> Tensor:
        """Logits of a residual stream: final norm, head, and the family's soft-cap or scale; (..., D) to (..., V)."""
        return self.read_logits(self.parts.final_norm(hidden))

    def read_logits(self, normed: Tensor) -> Tensor:
        """Logits of an already normed state."""
        logits = self.parts.lm_head(normed).float()
        if self._scale is not None:
            logits = logits / self._scale
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def run(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Residual stream at `last` after every block, l = 0..L: (L + 1, B, D)."""
        states: list[Tensor] = []

        def record(hidden: Tensor) -> None:
            states.append(hidden[:, -1].detach())

        with self._recording(record):
            self._forward(input_ids_BT, attention_mask_BT)
        return torch.stack(states)

    def run_masked(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, context_BT: Tensor, after_block: int, mask: str
    ) -> Tensor:
        """Residual stream at `last` after the last block when the context is masked after a block: (B, D).

        Args:
            input_ids_BT: Left-padded ids.
            attention_mask_BT: 1 for real tokens.
            context_BT: True for context tokens.
            after_block: l; 0 masks the input of block 1.
            mask: `zero` or `mean` (per channel over the context).

        Masking after block L changes nothing at `last`, which belongs to the query.
        """
        final: list[Tensor] = []

        def change(hidden: Tensor) -> Tensor:
            return mask_context(hidden, context_BT, mask)

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            final.append(_hidden_of(output)[:, -1].detach())

        with self._changing(after_block, change):
            handle = self.parts.layers[-1].register_forward_hook(keep)
            try:
                self._forward(input_ids_BT, attention_mask_BT)
            finally:
                handle.remove()
        return final[-1]

    def check_lens(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> None:
        """Self-test: the lens on h_L gives the model's own logits.

        Raises:
            ModelError: Naming the class when it does not, or when its outputs are not finite.
        """
        with torch.no_grad():
            states = self.run(input_ids_BT, attention_mask_BT)
            own = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False).logits[:, -1]
            lens = self.lens(states[-1])
        if not bool(torch.isfinite(own).all()):
            raise ModelError(f"{type(self.model).__name__}: its logits are not finite; the weights may hold NaN")
        error = float((lens - own.float()).abs().max())
        if error > LENS_TOLERANCE * max(1.0, float(own.abs().max())):
            raise ModelError(
                f"{type(self.model).__name__}: final norm and head do not reproduce its logits (largest error {error:.2g});"
                " this architecture is not supported"
            )

    def _forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> None:
        positions_BT = (attention_mask_BT.cumsum(-1) - 1).clamp_min(0)
        self.model.base_model(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, position_ids=positions_BT, use_cache=False
        )

    @contextmanager
    def _recording(self, record: Callable[[Tensor], None]) -> Iterator[None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            record(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            record(_hidden_of(output))

        handles = [self.parts.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
        handles += [layer.register_forward_hook(after) for layer in self.parts.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _changing(self, after_block: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        if after_block >= self.num_layers:
            yield
            return
        handle = self.parts.layers[after_block].register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def mask_context(hidden_BTD: Tensor, context_BT: Tensor, mask: str) -> Tensor:
    """Replaces the context's rows by zeros or by their mean per channel."""
    weights = context_BT[:, :, None].to(hidden_BTD.dtype)
    if mask == "zero":
        return hidden_BTD * (1 - weights)
    mean_B1D = (hidden_BTD * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp_min(1)
    return hidden_BTD * (1 - weights) + mean_B1D * weights


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
