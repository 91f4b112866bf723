"""The model at hand is asked how its loss over documents is computed: before training, and again once it is placed.

Two short documents are given to the model one by one, through its own logits and its own plain attention: that is
what is right. Then the ways to compute the same in training are tried in the order of their price, and the first that
is exact is taken: the same loss, the same gradient of every parameter, nothing that a later token or another document
changes. A model for which none is exact is refused, with what was measured. No family is known by name here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerplan.errors import ModelError, first_line
from layerplan.models.causal_lm import caps_scores, find_decoder_parts
from layerplan.models.document_starts import find_start_arguments
from layerplan.models.head import find_head_form, make_inputs, run_once
from layerplan.plan.loss_recipe import ROWS_TEXT, HeadForm, LossRecipe, Rows
from layerplan.train.attention import set_attention, try_set_attention
from layerplan.train.block_attention import ASKS_FOR_CAP
from layerplan.train.document_attention import UnservedAttentionError
from layerplan.train.exactness import (
    CANNOT_RUN,
    Exactness,
    Oracle,
    compare_losses,
    measure_alone,
    run_in_blocks,
    try_recipe,
)
from layerplan.train.flex_documents import uncompiled
from layerplan.train.sample_documents import Documents, make_documents
from layerplan.train.sharding import reshard
from layerplan.train.step import LossModel

_ROWS: tuple[Rows, ...] = ("packed", "reset", "alone")
_ATTENTION = ("sdpa", "eager")
_CAP = "it would drop the cap of the scores, which scores as small as those of fresh weights do not show"


@dataclass(frozen=True)
class SelfTestReport:
    """What the model answered."""

    recipe: LossRecipe
    loss_alone: float
    """Of the documents one by one, nats per token."""
    loss: float
    """By the recipe."""
    gradient_error: float | None
    """Difference of the gradient of all parameters, relative to its norm; None where gradients were not compared."""
    parameter_error: float | None
    """The largest difference of one parameter's gradient, relative to its norm."""
    refused: tuple[str, ...] = ()
    """What was tried before, and what it gave."""
    leaves_balance: bool = False
    """Whether its config asks for the loss of its routers' balance too, which is not trained here."""
    seconds: float = field(default=0.0, compare=False)

    @property
    def sentence(self) -> str:
        """The finding in one line, with the remedy's reason and price where one was needed."""
        line = f"{self.recipe.text}; loss {self.loss:.6f} where documents alone give {self.loss_alone:.6f}"
        if self.gradient_error is not None:
            line += f", the gradient within {self.gradient_error:.1e}, no parameter's off by more than {self.parameter_error:.1e}"
        line += "".join(f"; not {reason}" for reason in self.refused)
        if self.leaves_balance:
            line += "; output_router_logits in its config asks for a loss of its routers' balance, which is not trained"
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
    try_set_attention(model, "eager")
    head, oracle = _ask_alone(model, documents, with_gradients=with_gradients)
    refused: list[str] = []
    is_capped = _hands_over_cap(model)
    try:
        for form in dict.fromkeys((head, HeadForm("own"))):
            for rows, attention in _list_rungs(model):
                recipe = LossRecipe(rows, "eager" if attention == "eager" else "any", form)
                outcome = _CAP if is_capped and attention != "eager" else _try(oracle, recipe, attention)
                if isinstance(outcome, Exactness):
                    errors = outcome.gradient_error, outcome.parameter_error
                    seconds = time.perf_counter() - started
                    routed = bool(_list_routed(model))
                    return SelfTestReport(recipe, oracle.loss, outcome.loss, *errors, tuple(refused), routed, seconds)
                refused.append(
                    f"{ROWS_TEXT[rows]} under {attention}{'' if form == head else ', its own head'} ({outcome})"
                )
    finally:
        model.zero_grad(set_to_none=True)
    raise ModelError(
        f"{type(model).__name__}: no way to compute its loss over documents is exact, so it cannot be trained here:"
        f" {'; '.join(refused)}"
    )


def confirm_recipe(
    model: LossModel, *, seq_len: int, dtype: torch.dtype, with_window: bool = False
) -> tuple[float, float]:
    """Asks the placed model, by forward passes only: (loss of documents alone, loss by its recipe), nats per token.

    Every rank must call it; sharded layers are gathered together.

    Raises:
        ModelError: When the two differ by more than the dtype's bound, or what must not matter moves a loss.
    """
    causal_lm = model.causal_lm
    documents = make_documents(causal_lm, seq_len, with_window=with_window)
    before = causal_lm.config._attn_implementation
    was_training = model.training
    model.eval()
    with torch.no_grad(), uncompiled():
        try_set_attention(causal_lm, "eager")
        try:
            alone = measure_alone(model, documents)
        finally:
            try_set_attention(causal_lm, before)
        found = float(model(documents.trial(model.recipe.rows))) / documents.num_labels
    model.train(was_training)
    reshard(model)
    fault = compare_losses(alone, found, dtype)
    if fault is not None:
        raise ModelError(f"{type(causal_lm).__name__}, placed for training: {model.recipe.text}: {fault}")
    return alone, found


def _ask_alone(model: nn.Module, documents: Documents, *, with_gradients: bool) -> tuple[HeadForm, Oracle]:
    """What the documents give one by one: the loss the model gives itself, what its head does, and the oracle.

    All of it is asked of one pass through the layers where that can be: where the head stands beside them, the documents
    share a batch, and no router's state is wanted.
    """
    parts = find_decoder_parts(model)
    batches = list(documents.alone())
    is_shared = len(batches) == 1 and not _list_routed(model)
    with ExitStack() as once:
        if parts.trunk_path and not parts.lm_head_path.startswith(parts.trunk_path + "."):
            once.enter_context(run_once(model.get_submodule(parts.trunk_path)))
        with torch.set_grad_enabled(with_gradients and is_shared):
            check_own_loss(model, batches[0].input_ids_BT if is_shared else documents.whole[None, :4])
        head = find_head_form(model, parts.lm_head)
        if not is_shared:
            once.close()
        return head, Oracle(model, documents, with_gradients=with_gradients)


def check_own_loss(model: nn.Module, ids_BT: Tensor) -> None:
    """Raises `ModelError` when the loss the model gives for labels is not the next token's, or is no number."""
    try:
        logits, own = _ask_own_loss(model, ids_BT)
    except CANNOT_RUN as error:
        raise ModelError(
            f"{type(model).__name__}: cannot be run on token ids alone ({type(error).__name__}: {first_line(error)})"
        ) from None
    expected = float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten()))
    if not abs(expected) < float("inf"):
        raise ModelError(f"{type(model).__name__}: its logits are not finite; the weights may hold NaN or overflow")
    if own is not None and abs(own - expected) > 1e-3 * max(1.0, abs(expected)):
        raise ModelError(
            f"{type(model).__name__}: the loss it gives for labels is {own:.6f}, the next token's by its logits"
            f" {expected:.6f}; it is not trained to predict the next token"
        )


def _ask_own_loss(model: nn.Module, ids_BT: Tensor) -> tuple[Tensor, float | None]:
    """Logits, and the model's answer to `labels`, its routers' balance left out; None where it takes none."""
    routed = _list_routed(model)
    for config in routed:
        config.output_router_logits = False
    inputs = make_inputs(model, ids_BT)
    try:
        answer = model(**inputs, labels=ids_BT)
        return answer.logits.detach(), None if answer.loss is None else float(answer.loss.detach())
    except CANNOT_RUN:  # it takes no labels, or none like these
        return model(**inputs).logits.detach(), None
    finally:
        for config in routed:
            config.output_router_logits = True


def _list_routed(model: nn.Module) -> list[Any]:
    """Its configs that ask for the routers' state."""
    configs = (model.config, model.config.get_text_config())
    return [config for config in configs if getattr(config, "output_router_logits", False)]


def _list_rungs(model: nn.Module) -> Iterator[tuple[Rows, str]]:
    """Rows and attention in the order of their price."""
    for rows in _ROWS:
        if rows != "reset" or find_start_arguments(model):
            yield from ((rows, attention) for attention in _ATTENTION)


def _try(oracle: Oracle, recipe: LossRecipe, attention: str) -> Exactness | str:
    try:
        set_attention(oracle.model, attention)
    except ValueError as failure:
        return str(failure)
    return try_recipe(oracle, recipe)


def _hands_over_cap(model: nn.Module) -> bool:
    """Whether layers ask attention to cap scores: a config may name a cap that the layers' code leaves out (Gemma 3)."""
    if not caps_scores(model):
        return False
    device = next(model.parameters()).device
    fault = run_in_blocks(
        model, torch.zeros(1, 8, dtype=torch.int64, device=device), torch.arange(8, device=device)[None]
    )
    if isinstance(fault, UnservedAttentionError):
        return ASKS_FOR_CAP in str(fault)
    return fault is not None


def _list_prices(recipe: LossRecipe) -> list[str]:
    prices = []
    if recipe.attention == "eager":
        prices.append("the price of plain attention: every pair of a row's positions is held in memory")
    if recipe.rows == "reset":
        prices.append("the price of given starts: a micro-batch is one row")
    if recipe.rows == "alone":
        prices.append("the price of one document per row: rows are padded to the longest document beside them")
    if recipe.head.kind == "own":
        prices.append("the price of its own head: all logits of a micro-batch are held at once")
    return prices
