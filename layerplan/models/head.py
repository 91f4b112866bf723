"""What turns hidden states into logits, learned by asking the model: its head's weight, and what it does afterwards.

Families scale logits, cap them or add a bias, under names of their own. None of the names matters here: the head's
forward pass is replaced for a moment, so that the model's own code runs on logits that were chosen for what their
outcome tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.models.causal_lm import accepted_options
from layerplan.plan.loss_recipe import HeadForm

_HUGE = 1e30
_TOLERANCE = 1e-5


def find_head_form(model: nn.Module, head: nn.Module) -> HeadForm:
    """Asks the model what it does with its head's output.

    Args:
        model: A causal language model in float32.
        head: Its output head.
    """
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or type(head).forward is not nn.Linear.forward:
        return HeadForm("own")
    try:
        form = _ask(lambda logits: _after_head(model, head, logits), len(weight))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return HeadForm("own")
    return form or HeadForm("own")


def run_to_head(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Runs the model up to its head and returns the states that enter it, (B, T, D); the head itself costs nothing.

    Raises:
        RuntimeError: When the model does not call its head once, on one state per token.
    """
    entered: list[Tensor] = []

    def stand_in(states: Tensor) -> Tensor:
        entered.append(states)
        return states.new_zeros((*states.shape[:-1], 1))

    with replaced_forward(head, stand_in):
        model(**inputs)
    if len(entered) != 1 or entered[0].shape[:2] != inputs["input_ids"].shape:
        raise RuntimeError(f"{type(model).__name__} calls its head {len(entered)} times")
    return entered[0]


def make_inputs(model: nn.Module, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None) -> dict[str, Any]:
    """Arguments of a forward pass without a cache; positions only where they are given.

    Raises:
        TypeError: When positions are given to a model that takes none.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids_BT, **accepted_options(model, use_cache=False)}
    if position_ids_BT is not None:
        positions = accepted_options(model, position_ids=position_ids_BT)
        if not positions:
            raise TypeError(f"{type(model).__name__} takes no position_ids")
        inputs |= positions
    return inputs


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module another forward pass for a while."""
    instance = module.__dict__
    kept = {"forward": instance["forward"]} if "forward" in instance else {}
    instance["forward"] = forward
    try:
        yield
    finally:
        del instance["forward"]
        instance.update(kept)


@contextmanager
def run_once(module: nn.Module) -> Iterator[None]:
    """Lets a module run for its first call alone; its later ones get the same output, whatever they bring."""
    kept: list[Any] = []
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(plain(*args, **kwargs))
        return kept[0]

    with replaced_forward(module, forward):
        yield


@torch.no_grad()
def _after_head(model: nn.Module, head: nn.Module, logits_CV: Tensor) -> Tensor:
    ids = torch.zeros((1, len(logits_CV)), dtype=torch.long, device=logits_CV.device)
    with replaced_forward(head, lambda states: logits_CV[None].to(states.dtype)):
        result: Tensor = model(**make_inputs(model, ids)).logits
    return result[0].float()


def _ask(answer: Callable[[Tensor], Tensor], vocab_size: int) -> HeadForm | None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn((2, vocab_size), generator=generator) * torch.tensor([[1.0], [20.0]])
    found = answer(torch.cat([torch.ones(1, vocab_size), torch.full((1, vocab_size), _HUGE), grid]))
    if found.shape != (4, vocab_size) or not bool(torch.isfinite(found).all()):
        return None
    slope, bound = float(found[0, 0]), float(found[1, 0])
    if bound > _HUGE * abs(slope) / 2:
        form = HeadForm("linear", _tidy(slope))
    else:
        small = bound * 2.0**-12
        form = HeadForm("linear", _tidy(float(answer(torch.full((1, vocab_size), small))[0, 0]) / small), _tidy(bound))
    error = float((shape_logits(grid, form) - found[2:]).abs().max())
    return form if error <= _TOLERANCE * max(1.0, float(found[2:].abs().max())) else None


def shape_logits(logits: Tensor, form: HeadForm) -> Tensor:
    """What a `linear` head's output becomes."""
    scaled = logits * form.factor
    return scaled if form.softcap is None else torch.tanh(scaled / form.softcap) * form.softcap


def _tidy(value: float) -> float:
    """The decimal number that a config would hold: six digits are what float32 can tell."""
    return float(f"{value:.6g}")
