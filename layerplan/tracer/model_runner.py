"""One model, prepared for tracing: hooks on its layers, and the lens that reads a residual stream as a prediction.

Nothing here knows a family by name: the layers are found by structure (`find_decoder_parts`), and a residual stream is
read by the model's own forward pass with its layers taken out, so that final norm, projection, head, soft-cap, scale and
bias are applied by its own code.
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
from layerplan.models.causal_lm import FOREIGN_ERRORS, accepted_options, caps_scores, find_decoder_parts
from layerplan.models.head import make_inputs, replaced_forward, run_to_head

LENS_TOLERANCE = 1e-4


class LayerRunner:
    """Runs a decoder and exposes the residual stream around each block."""

    def __init__(self, model: nn.Module) -> None:
        """Finds the parts and checks the weights.

        Raises:
            ModelError: When the structure is unknown, there is one layer only, or a parameter is not finite.
        """
        self.model = model.eval()
        if caps_scores(model):
            model.set_attn_implementation("eager")
        self.name = type(model).__name__
        self.parts = find_decoder_parts(model)
        self.trunk = model.get_submodule(self.parts.trunk_path)
        self.num_layers = len(self.parts.layers)
        self._outputs: dict[int, Any] = {}
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
        """Float32 logits of a residual stream, by the model's own code after its last layer; (..., D) to (..., V)."""
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=flat.device)
        with self._layers_giving(flat):
            logits: Tensor = self.model(**make_inputs(self.model, ids)).logits
        return logits.reshape(*hidden.shape[:-1], -1).float()

    def lead_to_head(self, hidden: Tensor) -> Tensor:
        """What the head is given for a residual stream, by the model's own code after its last layer; (..., D) to (..., W)."""
        flat = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=flat.device)
        with self._layers_giving(flat):
            entered = run_to_head(self.model, self.parts.lm_head, make_inputs(self.model, ids))
        return entered.reshape(*hidden.shape[:-1], -1)

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
        self.trunk(input_ids=input_ids_BT, **accepted_options(self.trunk, use_cache=False), **extra)

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
        """Self-test: the lens on h_L gives the model's own logits, and a layer's input decides all that follows.

        Raises:
            ModelError: Naming the class and what was measured when one of them does not hold, the layers pass no
                residual stream of shape (B, T, D) on, or outputs are not finite.
        """
        try:
            self._check_lens(input_ids_BT)
        except FOREIGN_ERRORS as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{self.name}: cannot be traced, its code does not run with hooks around its layers ({first})"
            ) from error

    def _check_lens(self, input_ids_BT: Tensor) -> None:
        self._check_shapes(input_ids_BT)
        states = self.run(input_ids_BT)
        own = self.model(input_ids=input_ids_BT, **accepted_options(self.model, use_cache=False)).logits[:, -1].float()
        if not bool(torch.isfinite(own).all()):
            raise ModelError(f"{self.name}: its logits are not finite; the weights may hold NaN or overflow")
        error = float((self.lens(states[-1][:, -1]) - own).abs().max())
        if error > LENS_TOLERANCE * max(1.0, float(own.abs().max())):
            raise ModelError(
                f"{self.name}: what follows {self.parts.layers_path} does not reproduce its logits from the last layer's"
                f" output (largest error {error:.2g}); this architecture is not supported"
            )
        self._check_stream(input_ids_BT, states)

    def _check_shapes(self, input_ids_BT: Tensor) -> None:
        shapes: list[tuple[int, ...]] = []
        with ExitStack() as stack:
            for layer in self.parts.layers:

                def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                    shapes.append(tuple(_input_of(args, kwargs)[1].shape))

                stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
            self.forward(input_ids_BT)
        if len(shapes) != self.num_layers:
            raise ModelError(
                f"{self.name}: on text alone {len(shapes)} of its {self.num_layers} layers run; all are needed to trace it"
            )
        wanted = (*input_ids_BT.shape, shapes[0][-1])
        found = next((shape for shape in shapes if shape != wanted), wanted)
        if found != wanted:
            raise ModelError(
                f"{self.name}: its layers pass on states of shape {found}; a residual stream of (rows, tokens, width) ="
                f" {wanted} is needed to trace it"
            )

    def _check_stream(self, input_ids_BT: Tensor, states: Tensor) -> None:
        """A run on other tokens that is given these states before its middle layer must end as this run did.

        Layers that read something else, such as embeddings of their own or keys of layers below, carry a masked context
        past the mask, and what is then measured is not what the paper's equations say.
        """
        middle, final = self.num_layers // 2, list[Tensor]()

        def enter(layer_idx: int, hidden: Tensor) -> Tensor:
            return states[middle] if layer_idx == middle else hidden

        def leave(hidden: Tensor) -> Tensor:
            final.append(hidden)
            return hidden

        with self.intercepting(len(input_ids_BT), enter, leave):
            self.forward(input_ids_BT.roll(1, dims=1))
        error, scale = float((final[0] - states[-1]).abs().max()), float(states[-1].abs().max())
        if error > LENS_TOLERANCE * max(1.0, scale):
            raise ModelError(
                f"{self.name}: its layers read more than the residual stream, so that masking it does not hide the context"
                f" (other tokens below layer {middle} still move the end by {error:.2g}); it cannot be traced"
            )

    @contextmanager
    def _layers_giving(self, hidden: Tensor) -> Iterator[None]:
        """Takes every layer out of the model: the last gives these states, the others what they are given."""
        if not self._outputs:
            self._see_outputs()
        with ExitStack() as stack:
            for layer_idx, layer in enumerate(self.parts.layers):
                final = hidden if layer_idx == self.num_layers - 1 else None
                stack.enter_context(replaced_forward(layer, _giving(final, self._outputs.get(layer_idx))))
            yield

    @torch.no_grad()
    def _see_outputs(self) -> None:
        """Runs the model on two tokens to see in what each layer wraps its output."""
        with ExitStack() as stack:
            for layer_idx, layer in enumerate(self.parts.layers):

                def note(module: nn.Module, args: Any, output: Any, layer_idx: int = layer_idx) -> None:
                    self._outputs[layer_idx] = _with_hidden(_emptied(output), None)

                stack.callback(layer.register_forward_hook(note).remove)
            self.forward(torch.zeros(1, 2, dtype=torch.long, device=self.device))


def _giving(hidden: Tensor | None, wrapping: Any) -> Callable[..., Any]:
    """A layer's forward pass that gives these states, or else its own input, wrapped as the layer's own output is."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _with_hidden(wrapping, _input_of(args, kwargs)[1] if hidden is None else hidden)

    return forward


def _emptied(output: Any) -> Any:
    return type(output)([None] * len(output)) if isinstance(output, tuple | list) else None


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Tensor]:
    """A layer's residual stream among its arguments, and its name when it is passed by name."""
    if args:
        return "", args[0]
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return name, kwargs[name]


def _entering(layer_idx: int, num_rows: int, enter: Callable[[int, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own_name, hidden = _input_of(args, kwargs)
        replaced = enter(layer_idx, hidden)
        times = replaced.shape[0] // num_rows
        rest = _repeat_rows(args[1:], num_rows, times)
        named = {name: _repeat_rows(value, num_rows, times) for name, value in kwargs.items() if name != own_name}
        return ((replaced, *rest), named) if args else (args, {**named, own_name: replaced})

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
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _with_hidden(output: Any, hidden: Tensor | None) -> Any:
    return type(output)([hidden, *output[1:]]) if isinstance(output, tuple | list) else hidden
