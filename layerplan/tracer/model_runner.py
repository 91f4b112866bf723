"""One model, prepared for tracing: hooks on its layers, and the lens that reads a residual stream as a prediction.

Nothing here knows a family by name: the layers are found by structure (`find_decoder_parts`), and the head is read
through the model's own forward pass, so that every logit soft-cap, scale or bias it has is applied by its own code.
Batches hold probes of one length, so there is no padding and `last` is position T-1.

Shapes: B probes, T tokens, D hidden, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.errors import ModelError
from layerplan.models.causal_lm import find_decoder_parts

LENS_TOLERANCE = 1e-4


class LayerRunner:
    """Runs a decoder and exposes the residual stream around each block."""

    def __init__(self, model: nn.Module) -> None:
        """Finds the parts and checks the weights.

        Raises:
            ModelError: When the structure is unknown, there is one layer only, or a parameter is not finite.
        """
        self.model = model.eval()
        if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
            # transformers' default attention drops this soft-cap without a word
            model.set_attn_implementation("eager")
        self.name = type(model).__name__
        self.parts = find_decoder_parts(model)
        self.trunk = model.get_submodule(self.parts.layers_path.rpartition(".")[0])
        self.num_layers = len(self.parts.layers)
        if self.num_layers < 2:
            raise ModelError(f"{self.name}: has {self.num_layers} layer; tracing needs at least 2")
        for path, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ModelError(f"{self.name}: parameter {path} holds NaN or infinite values")

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.parts.lm_head.weight.device

    def lens(self, hidden: Tensor) -> Tensor:
        """Logits of a residual stream: final norm, head, and whatever the family does to logits; (..., D) to (..., V)."""
        return self.read_logits(self.parts.final_norm(hidden))

    def read_logits(self, normed: Tensor) -> Tensor:
        """Logits of already normed states, in float32, by the model's own code after its trunk."""
        flat = normed.reshape(1, -1, normed.shape[-1])
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=flat.device)
        with self._trunk_returning(flat):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.reshape(*normed.shape[:-1], -1).float()

    def run(self, input_ids_BT: Tensor) -> Tensor:
        """Residual stream of every position around every block, l = 0..L: (L + 1, B, T, D)."""
        states: list[Tensor] = []

        def enter(layer_idx: int, hidden: Tensor) -> Tensor:
            states.append(hidden)
            return hidden

        def leave(hidden: Tensor) -> Tensor:
            states.append(hidden)
            return hidden

        with self.intercepting(len(input_ids_BT), enter, leave):
            self.forward(input_ids_BT)
        return torch.stack(states)

    def forward(self, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None) -> None:
        """Runs the trunk for its hooks; without positions the model counts from 0."""
        extra = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        self.trunk(input_ids=input_ids_BT, use_cache=False, **extra)

    @contextmanager
    def intercepting(
        self, num_rows: int, enter: Callable[[int, Tensor], Tensor], leave: Callable[[Tensor], Tensor]
    ) -> Iterator[None]:
        """Lets `enter(layer_idx, hidden)` replace the input of every layer, and `leave` the last one's output.

        A layer whose input got a multiple of the trunk's `num_rows` rows gets its other per-row arguments (masks,
        rotary angles, position ids) repeated to match.
        """
        with ExitStack() as stack:
            for layer_idx, layer in enumerate(self.parts.layers):
                handle = layer.register_forward_pre_hook(_entering(layer_idx, num_rows, enter), with_kwargs=True)
                stack.callback(handle.remove)
            handle = self.parts.layers[-1].register_forward_hook(
                lambda module, args, output: _with_hidden(output, leave(_hidden_of(output)))
            )
            stack.callback(handle.remove)
            yield

    def check_lens(self, input_ids_BT: Tensor) -> None:
        """Self-test: the lens on h_L gives the model's own logits.

        Raises:
            ModelError: Naming the class when it does not, or when its outputs are not finite.
        """
        states = self.run(input_ids_BT)
        own = self.model(input_ids=input_ids_BT, use_cache=False).logits[:, -1].float()
        if not bool(torch.isfinite(own).all()):
            raise ModelError(f"{self.name}: its logits are not finite; the weights may hold NaN or overflow")
        error = float((self.lens(states[-1][:, -1]) - own).abs().max())
        if error > LENS_TOLERANCE * max(1.0, float(own.abs().max())):
            raise ModelError(
                f"{self.name}: {self.parts.final_norm_path} and {self.parts.lm_head_path} do not reproduce its logits"
                f" from {self.parts.layers_path} (largest error {error:.2g}); this architecture is not supported"
            )

    @contextmanager
    def _trunk_returning(self, hidden: Tensor) -> Iterator[None]:
        """Makes the trunk's forward return these states, so that a call of the model costs the head alone."""
        instance = self.trunk.__dict__
        kept = {"forward": instance["forward"]} if "forward" in instance else {}
        instance["forward"] = lambda *args, **kwargs: _TrunkOutput(hidden)
        try:
            yield
        finally:
            del instance["forward"]
            instance.update(kept)


class _TrunkOutput:
    """Stands for any trunk output: the hidden states, and nothing under every other name."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, key: Any) -> Any:
        return () if isinstance(key, slice) else self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _entering(layer_idx: int, num_rows: int, enter: Callable[[int, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        replaced = enter(layer_idx, hidden)
        times = replaced.shape[0] // num_rows
        rest = _repeat_rows(args[1:], num_rows, times)
        named = {
            name: _repeat_rows(value, num_rows, times) for name, value in kwargs.items() if name != "hidden_states"
        }
        return ((replaced, *rest), named) if args else (args, {**named, "hidden_states": replaced})

    return hook


def _repeat_rows(value: Any, num_rows: int, times: int) -> Any:
    """Repeats every tensor that has one entry per row of the batch, inside tuples and mappings too."""
    if times == 1:
        return value
    if isinstance(value, Tensor):
        has_rows = value.ndim >= 2 and value.shape[0] == num_rows
        return value.repeat(times, *[1] * (value.ndim - 1)) if has_rows else value
    if isinstance(value, tuple):
        return tuple(_repeat_rows(item, num_rows, times) for item in value)
    if isinstance(value, dict):
        return {name: _repeat_rows(item, num_rows, times) for name, item in value.items()}
    return value


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
