"""A model run from above its frozen prefix: the prefix's output is noted down in one pass and put in its place in another.

Layers that are passed over hand on what they are given, in the form they would have used, and the last of them gives the
states that were noted; embeddings, masks and positions are made as always. Whether a model's upper layers want nothing
else of its lower ones, it is asked. Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerplan.corpus.rows import PackedRows
from layerplan.errors import first_line
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.head import replaced_forward
from layerplan.train.exactness import CANNOT_RUN
from layerplan.train.step import LossModel, TensorBatch

DEPENDS_ON_OTHERS = (
    "a row's states depend on the rows beside it in a micro-batch, to the last bit; micro_batch_size=1 would do"
)


class Prefix:
    """The decoder layers of a model below its first trained one.

    Attributes:
        row_shape: (T, D) of the states of a row, once some were noted.
        dtype: Of them.
    """

    row_shape: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32

    def __init__(self, causal_lm: nn.Module, cut: int) -> None:
        self._layers = list(find_decoder_parts(causal_lm).layers)[:cut]
        self._makers: dict[int, Callable[[Tensor], Any]] = {}

    @contextmanager
    def noting(self, note: Callable[[Tensor], None]) -> Iterator[None]:
        """Runs everything, and hands the prefix's output (B, T, D) to `note`."""

        def take(module: nn.Module, args: Any, output: Any) -> None:
            states = _states_of(output)
            self.row_shape, self.dtype = (states.shape[1], states.shape[2]), states.dtype
            note(states)

        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_hook(self._learn_form(index)).remove)
            stack.callback(self._layers[-1].register_forward_hook(take).remove)
            yield

    @contextmanager
    def replaced_by(self, states_BTD: Tensor) -> Iterator[None]:
        """Runs what is above the prefix alone, on these states."""
        with ExitStack() as stack:
            for index, layer in enumerate(self._layers):
                is_last = index == len(self._layers) - 1
                stand_in = self._make_stand_in(index, states_BTD if is_last else None)
                stack.enter_context(replaced_forward(layer, stand_in))
            yield

    def _learn_form(self, index: int) -> Callable[..., None]:
        def learn(module: nn.Module, args: Any, output: Any) -> None:
            count = len(output) if isinstance(output, tuple) else 0
            self._makers[index] = lambda states: (states, *[None] * (count - 1)) if count else states

        return learn

    def _make_stand_in(self, index: int, states: Tensor | None) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            return self._makers[index](given if states is None else states)

        return stand_in


def find_prefix_fault(model: LossModel, prefix: Prefix, *, rows: int, seq_len: int, device: torch.device) -> str:
    """Why the states of a row cannot be used again, found by asking the placed model; empty when they can.

    Four passes over drawn rows of two documents, to the last bit: the states must not depend on chance nor on the rows
    beside them, nothing below may train, and the loss must be the same without the prefix.
    """
    was_training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            return _find_fault(model, prefix, draw_rows(model, 2 * rows, seq_len), rows, device)
    except CANNOT_RUN as error:
        return f"its layers cannot be passed over ({type(error).__name__}: {first_line(error)})"
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def draw_rows(model: LossModel, count: int, seq_len: int) -> PackedRows:
    """Rows of two documents of drawn tokens, the same on every worker."""
    vocab_size = find_decoder_parts(model.causal_lm).embeddings.weight.shape[0]
    ids = np.random.default_rng(0).integers(0, vocab_size, (count, seq_len), dtype=np.int32)
    columns = np.tile(np.arange(seq_len, dtype=np.int32), (count, 1))
    start = max(1, seq_len // 3)
    positions = np.where(columns >= start, columns - start, columns).astype(np.int32)
    return PackedRows(np.arange(count, dtype=np.int64), ids, (columns >= start).astype(np.int32), positions)


def _find_fault(model: LossModel, prefix: Prefix, pool: PackedRows, size: int, device: torch.device) -> str:
    first = pool.take(0, size)
    states, loss = _run(model, prefix, first, device, seed=0)
    if states.requires_grad:
        return "what it is made of trains"
    again, _ = _run(model, prefix, first, device, seed=1)
    if not torch.equal(again, states):
        return "the model's lower layers give other states each time, by dropout or noise"
    # every other row stays, at another place and beside others
    order = np.array([row + size * (row % 2) for row in range(size)])[::-1].copy()
    moved, _ = _run(model, prefix, pool.select(order), device, seed=0)
    if not all(torch.equal(moved[at], states[row]) for at, row in enumerate(order) if row < size):
        return DEPENDS_ON_OTHERS
    batch = _make(model, first, device)
    torch.manual_seed(0)
    with prefix.replaced_by(states.clone()):
        found = model(batch).detach()
    if not torch.equal(found, loss):
        return (
            f"its upper layers want more of the lower ones than states: the loss differs by {float(found - loss):.3g}"
        )
    return ""


def _run(
    model: LossModel, prefix: Prefix, rows: PackedRows, device: torch.device, *, seed: int
) -> tuple[Tensor, Tensor]:
    noted: list[Tensor] = []
    batch = _make(model, rows, device)
    torch.manual_seed(seed)
    with prefix.noting(noted.append):
        loss = model(batch)
    (states,) = noted
    return states, loss.detach()


def _make(model: LossModel, rows: PackedRows, device: torch.device) -> TensorBatch:
    (batch,) = model.make_batches(rows, len(rows), device)
    return batch


def _states_of(output: Any) -> Tensor:
    states = output[0] if isinstance(output, tuple) else output
    if not isinstance(states, Tensor) or states.ndim != 3:
        found = f"{states.ndim} dimensions" if isinstance(states, Tensor) else type(states).__name__
        raise TypeError(f"a layer gives {found}, states (B, T, D) are expected")
    return states
