"""The model at hand is asked how its loss over documents is computed: before training, and again once it is placed.

Two short documents are given to the model one by one, through its own logits and its own plain attention: that is
what is right. Then the ways to compute the same in training are tried in the order of their price, and the first that
is exact is taken: the same loss, the same gradient of every parameter, nothing that a later token or another document
changes. A model for which none is exact is refused, with what was measured. No family is known by name here.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerplan.errors import ModelError, first_line
from layerplan.models.causal_lm import FOREIGN_ERRORS, find_decoder_parts
from layerplan.models.head import find_head_form, make_inputs
from layerplan.plan.loss_recipe import HeadForm, LossRecipe
from layerplan.train.sample_documents import Documents, make_documents
from layerplan.train.step import LossModel

_LADDER: tuple[tuple[Literal["packed", "alone"], str], ...] = (
    ("packed", "sdpa"),
    ("packed", "eager"),
    ("alone", "sdpa"),
    ("alone", "eager"),
)
_CANNOT_RUN = (*FOREIGN_ERRORS, AssertionError, ImportError)
"""What model code raises on input it was not made for."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Of losses per token, relative to the larger of 1 and the loss."""
_GRADIENT_TOLERANCE = 1e-3
"""Of a gradient in float32, relative to its norm: through the 30 layers of a real model rounding alone makes 1e-4."""


@dataclass(frozen=True)
class SelfTestReport:
    """What the model answered."""

    recipe: LossRecipe
    loss_alone: float
    """Of the documents one by one, nats per token."""
    loss: float
    """By the recipe."""
    gradient_error: float | None
    """Largest difference of a parameter's gradient, relative to its norm; None where gradients were not compared."""
    refused: tuple[str, ...] = ()
    """What was tried before, and what it gave."""
    seconds: float = field(default=0.0, compare=False)

    @property
    def sentence(self) -> str:
        """The finding in one line, with the remedy's reason and price where one was needed."""
        line = f"{self.recipe.text}; loss {self.loss:.6f} where documents alone give {self.loss_alone:.6f}"
        if self.gradient_error is not None:
            line += f", gradients within {self.gradient_error:.1e}"
        line += "".join(f"; not {reason}" for reason in self.refused)
        return line + "".join(f"; {price}" for price in _list_prices(self.recipe))

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `self_test.json` keeps them."""
        return vars(self) | {"recipe": self.recipe.to_json(), "sentence": self.sentence}


def ask_model(model: nn.Module, *, seq_len: int, with_gradients: bool = True) -> SelfTestReport:
    """Chooses how the model's loss is computed, and leaves the attention of that choice set.

    Args:
        model: A causal language model from transformers in float32, whole, on one device; every parameter that may be
            trained requires a gradient. Its gradients are used and cleared.
        seq_len: Tokens per row of the run; a window longer than that cannot matter.
        with_gradients: Compare gradients too, which needs the memory of one more copy of the parameters.

    Raises:
        ModelError: When its logits are not finite, its own loss is not that of the next token, or nothing is exact;
            names the class, and what was measured.
    """
    started = time.perf_counter()
    model.eval()
    documents = make_documents(model, seq_len)
    head = find_head_form(model, find_decoder_parts(model).lm_head)
    try_set_attention(model, "eager")
    check_own_loss(model, documents)
    oracle = Oracle(model, documents, with_gradients=with_gradients)
    refused: list[str] = []
    try:
        for form in dict.fromkeys((head, HeadForm("own"))):
            for rows, attention in _LADDER:
                recipe = LossRecipe(rows, "eager" if attention == "eager" else "any", form)
                outcome = _try(oracle, recipe, attention)
                if isinstance(outcome, Exactness):
                    seconds = time.perf_counter() - started
                    return SelfTestReport(
                        recipe, oracle.loss, outcome.loss, outcome.gradient_error, tuple(refused), seconds
                    )
                refused.append(f"{rows} rows under {attention}{'' if form == head else ', its own head'} ({outcome})")
    finally:
        model.zero_grad(set_to_none=True)
    raise ModelError(
        f"{type(model).__name__}: no way to compute its loss over documents is exact, so it cannot be trained here:"
        f" {'; '.join(refused)}"
    )


@dataclass(frozen=True)
class Exactness:
    """What an exact recipe gave."""

    loss: float
    gradient_error: float | None


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
                self.loss = _measure_alone(LossModel(self.model), self.documents, backward=self.with_gradients)
        except _CANNOT_RUN as error:
            raise ModelError(
                f"{type(self.model).__name__}: cannot be run backwards in eval mode ({type(error).__name__}: {first_line(error)})"
            ) from None
        gradients = ((name, value.grad) for name, value in self.model.named_parameters())
        self.norms = {name: float(gradient.norm()) for name, gradient in gradients if gradient is not None}


def confirm_recipe(model: LossModel, *, seq_len: int, dtype: torch.dtype) -> tuple[float, float]:
    """Asks the placed model, by forward passes only: (loss of documents alone, loss by its recipe), nats per token.

    Every rank must call it; sharded layers are gathered together.

    Raises:
        ModelError: When the two differ by more than the dtype's bound, or what must not matter moves a loss.
    """
    causal_lm = model.causal_lm
    documents = make_documents(causal_lm, seq_len, with_window=False)
    before = causal_lm.config._attn_implementation
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try_set_attention(causal_lm, "eager")
        try:
            alone = _measure_alone(model, documents)
        finally:
            try_set_attention(causal_lm, before)
        found = float(model(documents.batch(model.recipe.rows))) / documents.num_labels
        fault = _compare_losses(alone, found, dtype) or _find_leak(model, documents, dtype, with_gradients=False)
    model.train(was_training)
    if fault is not None:
        raise ModelError(f"{type(causal_lm).__name__}, placed for training: {model.recipe.text}: {fault}")
    return alone, found


def set_attention(model: nn.Module, name: str) -> None:
    """Sets transformers' attention implementation.

    Raises:
        ValueError: When the model does not have it.
    """
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"no {name} attention: {first_line(error)}") from None


def try_set_attention(model: nn.Module, name: str) -> None:
    """As `set_attention`; a model that cannot be told keeps its own code."""
    with suppress(ValueError):
        set_attention(model, name)


def check_own_loss(model: nn.Module, documents: Documents) -> None:
    """Raises `ModelError` when the loss the model gives for labels is not the next token's, or is no number."""
    ids = documents.ids[0][None, :4]
    try:
        logits, own = _ask_own_loss(model, ids)
    except _CANNOT_RUN as error:
        raise ModelError(
            f"{type(model).__name__}: cannot be run on token ids alone ({type(error).__name__}: {first_line(error)})"
        ) from None
    expected = float(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
    if not abs(expected) < float("inf"):
        raise ModelError(f"{type(model).__name__}: its logits are not finite; the weights may hold NaN or overflow")
    if own is not None and abs(own - expected) > 1e-3 * max(1.0, abs(expected)):
        raise ModelError(
            f"{type(model).__name__}: the loss it gives for labels is {own:.6f}, the next token's by its logits"
            f" {expected:.6f}; it is not trained to predict the next token"
        )


@torch.no_grad()
def _ask_own_loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, float | None]:
    """Logits, and the model's answer to `labels`, its routers' balance left out; None where it takes none."""
    routed = [
        each for each in (model.config, model.config.get_text_config()) if getattr(each, "output_router_logits", False)
    ]
    for config in routed:
        config.output_router_logits = False
    inputs = make_inputs(model, ids)
    try:
        answer = model(**inputs, labels=ids)
        return answer.logits, None if answer.loss is None else float(answer.loss)
    except _CANNOT_RUN:  # it takes no labels, or none like these
        return model(**inputs).logits, None
    finally:
        for config in routed:
            config.output_router_logits = True


def _try(oracle: Oracle, recipe: LossRecipe, attention: str) -> Exactness | str:
    """How exact a recipe is, or what is wrong with it."""
    model = LossModel(oracle.model, recipe)
    documents = oracle.documents
    try:
        set_attention(oracle.model, attention)
        with torch.set_grad_enabled(oracle.with_gradients):
            total = model(documents.batch(recipe.rows), -1.0)
        loss = float(total.detach()) / documents.num_labels
        fault = _compare_losses(oracle.loss, loss, torch.float32)
        fault = fault or _find_leak(model, documents, torch.float32, with_gradients=oracle.with_gradients)
    except _CANNOT_RUN as failure:
        return f"{type(failure).__name__}: {first_line(failure)}"
    if fault is not None or not oracle.with_gradients:
        return fault or Exactness(loss, None)
    return _compare_gradients(oracle, total, loss)


def _compare_gradients(oracle: Oracle, total: Tensor, loss: float) -> Exactness | str:
    """Takes a recipe's gradients off the oracle's; what is left of them must be nothing.

    No gradient counts for less than a thousandth of the largest: some, as of biases before a softmax, are zero but for
    rounding.
    """
    try:
        (total * -1.0).backward()
    except _CANNOT_RUN as failure:
        oracle.measure()
        return f"{type(failure).__name__} in the backward pass: {first_line(failure)}"
    floor = 1e-3 * max(oracle.norms.values(), default=1.0)
    left = ((name, value.grad) for name, value in oracle.model.named_parameters())
    errors = {
        name: float(gradient.norm()) / max(oracle.norms.get(name, 0.0), floor, 1e-30)
        for name, gradient in left
        if gradient is not None
    }
    where = max(errors, key=lambda name: errors[name])
    if errors[where] <= _GRADIENT_TOLERANCE:
        return Exactness(loss, errors[where])
    oracle.measure()
    return f"the gradient of {where} differs by {errors[where]:.2g} of its norm"


def _measure_alone(model: LossModel, documents: Documents, *, backward: bool = False) -> float:
    total = 0.0
    for batch in documents.alone():
        loss = model(batch, naive=True)
        if backward:
            loss.backward()
        total += float(loss.detach())
    return total / documents.num_labels


def _compare_losses(alone: float, found: float, dtype: torch.dtype) -> str | None:
    if abs(found - alone) <= _TOLERANCE[dtype] * max(1.0, abs(alone)):
        return None
    return f"a loss of {found:.6g} where the documents alone give {alone:.6g}"


def _find_leak(model: LossModel, documents: Documents, dtype: torch.dtype, *, with_gradients: bool) -> str | None:
    """Whether the loss of the second document's first half depends on anything outside of it.

    By value, with everything outside changed; by gradient, which is exactly zero where nothing flows.
    """
    part = len(documents.ids[1]) // 2
    before, flow = _measure_part(model, documents, part, with_gradients=with_gradients)
    with torch.no_grad():
        after = float(model(documents.batch(model.recipe.rows, part=part, changed=True))) / part
    if abs(after - before) > _TOLERANCE[dtype] * max(1.0, abs(before)):
        return f"later tokens and other documents move a loss from {before:.6g} to {after:.6g}"
    return None if flow == 0.0 else f"a gradient of {flow:.3g} reaches later tokens or other documents"


def _measure_part(model: LossModel, documents: Documents, part: int, *, with_gradients: bool) -> tuple[float, float]:
    """Loss per token of a part, and the largest gradient that flows out of it into embeddings."""
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        entered.append(output.detach().requires_grad_())
        return entered[-1].clone()  # CTRL scales it in place, which a leaf does not allow

    batch = documents.batch(model.recipe.rows, part=part)
    if not with_gradients:
        with torch.no_grad():
            return float(model(batch)) / part, 0.0
    handle = find_decoder_parts(model.causal_lm).embeddings.register_forward_hook(keep)
    try:
        loss = model(batch)
        (gradient,) = torch.autograd.grad(loss, entered[:1], allow_unused=True)
    finally:
        handle.remove()
    outside = documents.outside(model.recipe.rows, part)
    is_seen = gradient is not None and gradient.shape[:2] == outside.shape
    return float(loss.detach()) / part, float(gradient[outside].abs().max()) if is_seen else 0.0


def _list_prices(recipe: LossRecipe) -> list[str]:
    prices = []
    if recipe.attention == "eager":
        prices.append("the price of plain attention: every pair of a row's positions is held in memory")
    if recipe.rows == "alone":
        prices.append("the price of one document per row: rows are padded to the longest document beside them")
    if recipe.head.kind == "own":
        prices.append("the price of its own head: all logits of a micro-batch are held at once")
    return prices
