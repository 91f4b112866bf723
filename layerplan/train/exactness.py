"""Whether a recipe computes what the documents give one by one: losses, gradients, and what must not matter.

A weight is read from memory once per pass, and on a CPU that is what a pass over a few tokens costs. So there is one pass
over the documents alone and one by each recipe, forward and back: of the same labels, while everything around them that
must not matter is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerplan.errors import ModelError, first_line
from layerplan.models.causal_lm import FOREIGN_ERRORS, find_decoder_parts
from layerplan.models.head import make_inputs
from layerplan.plan.loss_recipe import LOSS_BOUNDS, LossRecipe
from layerplan.train.attention import set_attention, try_set_attention
from layerplan.train.block_attention import BLOCKS
from layerplan.train.sample_documents import Documents
from layerplan.train.step import LossModel

CANNOT_RUN = (*FOREIGN_ERRORS, AssertionError, ImportError)
"""What model code raises on input it was not made for."""
_TOLERANCE = {getattr(torch, name): bound for name, bound in LOSS_BOUNDS.items()}
_GRADIENT_TOLERANCE = 1e-4
"""Of the gradient of all parameters in float32, relative to its norm: through 30 layers rounding makes 1.6e-5."""
_PARAMETER_TOLERANCE = 1e-3
"""Of one parameter's gradient: rounding makes 4e-5 to 1.1e-4 there, by documents and machine, most in norms' weights."""


def run_in_blocks(model: nn.Module, ids_BT: Tensor, position_ids_BT: Tensor | None) -> Exception | None:
    """What comes up when layers get attention in blocks, which refuses what they ask beyond a mask; None when nothing does."""
    before = model.config._attn_implementation
    try:
        set_attention(model, BLOCKS)
        with torch.no_grad():
            model(**make_inputs(model, ids_BT, position_ids_BT))
    except CANNOT_RUN as error:
        return error
    finally:
        try_set_attention(model, before)
    return None


@dataclass(frozen=True)
class Exactness:
    """What an exact recipe gave."""

    loss: float
    gradient_error: float | None = None
    """Of all parameters together, relative to the norm."""
    parameter_error: float | None = None
    """The largest of one parameter."""


class Oracle:
    """The documents one by one: their loss, and with it the gradients that lie in the parameters."""

    def __init__(self, model: nn.Module, documents: Documents, *, with_gradients: bool) -> None:
        self.model = model
        self.documents = documents
        self.with_gradients = with_gradients
        self.norms: dict[str, float] = {}
        self.measure()

    def measure(self) -> None:
        """Measures anew, gradients too."""
        self.model.zero_grad(set_to_none=True)
        try_set_attention(self.model, "eager")
        try:
            with torch.set_grad_enabled(self.with_gradients):
                self.loss = measure_alone(LossModel(self.model), self.documents, backward=self.with_gradients)
        except CANNOT_RUN as error:
            raise ModelError(
                f"{type(self.model).__name__}: cannot be run backwards in eval mode ({type(error).__name__}: {first_line(error)})"
            ) from None
        self.norms = _measure_gradients(self.model)


def measure_alone(model: LossModel, documents: Documents, *, backward: bool = False) -> float:
    """Loss of the documents one by one through the model's own logits, nats per token; gradients are of the sum."""
    total = 0.0
    for batch in documents.alone():
        loss = model(batch, naive=True)
        if backward:
            loss.backward()
        total += float(loss.detach())
    return total / documents.num_labels


def try_recipe(oracle: Oracle, recipe: LossRecipe) -> Exactness | str:
    """How exact a recipe is under the attention that is set, or what is wrong with it."""
    documents = oracle.documents
    try:
        with torch.set_grad_enabled(oracle.with_gradients), _embedded(oracle.model) as embedded:
            total = LossModel(oracle.model, recipe)(documents.trial(recipe.rows), -1.0)
    except CANNOT_RUN as failure:
        return f"{type(failure).__name__}: {first_line(failure)}"
    loss = float(total.detach()) / documents.num_labels
    fault = compare_losses(oracle.loss, loss, torch.float32)
    if fault is not None or not oracle.with_gradients:
        return fault or Exactness(loss)
    outcome = _compare_gradients(oracle, total, embedded, documents.outside(recipe.rows), loss)
    if isinstance(outcome, str):
        oracle.measure()
    return outcome


def compare_losses(alone: float, found: float, dtype: torch.dtype) -> str | None:
    """What is wrong with a recipe's loss, or nothing."""
    if abs(found - alone) <= _TOLERANCE[dtype] * max(1.0, abs(alone)):
        return None
    return f"a loss of {found:.6g} where the documents alone give {alone:.6g}"


def _compare_gradients(
    oracle: Oracle, total: Tensor, embedded: list[Tensor], outside: Tensor, loss: float
) -> Exactness | str:
    """Takes a recipe's gradients off the oracle's, of which nothing must be left.

    No parameter's counts for less than a thousandth of the largest: some, as of biases before a softmax, are zero but for
    rounding.
    """
    try:
        (total * -1.0).backward()
    except CANNOT_RUN as failure:
        return f"{type(failure).__name__} in the backward pass: {first_line(failure)}"
    flow = _measure_flow(embedded, outside)
    if flow != 0.0:
        return f"a gradient of {flow:.3g} reaches later tokens or other documents"
    left = _measure_gradients(oracle.model)
    floor = max(1e-3 * max(oracle.norms.values(), default=1.0), 1e-30)
    errors = {name: norm / max(oracle.norms.get(name, 0.0), floor) for name, norm in left.items()}
    where = max(errors, key=lambda name: errors[name])
    if not errors[where] <= _PARAMETER_TOLERANCE:
        return f"the gradient of {where} differs by {errors[where]:.2g} of its norm"
    error = _join_norms(left) / max(_join_norms(oracle.norms), 1e-30)
    if not error <= _GRADIENT_TOLERANCE:
        return f"the gradient of all parameters differs by {error:.2g} of its norm, most in {where}"
    return Exactness(loss, error, errors[where])


def _measure_gradients(model: nn.Module) -> dict[str, float]:
    gradients = ((name, value.grad) for name, value in model.named_parameters())
    return {name: float(gradient.norm()) for name, gradient in gradients if gradient is not None}


def _join_norms(norms: dict[str, float]) -> float:
    return float(sum(norm**2 for norm in norms.values()) ** 0.5)


@contextmanager
def _embedded(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the model's embedding gives out; each keeps its gradient."""
    given: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output.requires_grad_()
        output.retain_grad()
        given.append(output)
        return output.clone()  # CTRL scales it in place

    handle = find_decoder_parts(model).embeddings.register_forward_hook(keep)
    try:
        yield given
    finally:
        handle.remove()


def _measure_flow(embedded: list[Tensor], outside_BT: Tensor) -> float:
    """Largest gradient at the positions that no label must depend on: exactly zero where nothing flows."""
    gradient = embedded[0].grad if embedded else None
    if gradient is None or gradient.shape[:2] != outside_BT.shape or not bool(outside_BT.any()):
        return 0.0
    return float(gradient[outside_BT].abs().max())
