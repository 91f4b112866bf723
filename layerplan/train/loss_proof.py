"""When the model is asked about its loss, and what a run's checkpoints are bound to by the answer.

Before workers start (`layerplan.train.asking`); in the workers, when nobody asked before; and on the placed model before
its first step, whatever was said before. Rank 0 tells, all obey.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from layerplan.errors import CheckpointError, ModelError, first_line
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.meta import hollow_values
from layerplan.models.ref import ModelRef
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.train.attention import set_attention, try_set_attention
from layerplan.train.document_attention import SEGMENTED
from layerplan.train.exactness import CANNOT_RUN, run_in_blocks
from layerplan.train.flex_documents import FLEX, uncompiled
from layerplan.train.sample_documents import find_shortest_window, make_documents
from layerplan.train.self_test import SelfTestReport, ask_model, confirm_recipe
from layerplan.train.state import TrainState
from layerplan.train.step import LossModel

logger = logging.getLogger(__name__)

_BYTES_PER_PARAMETER = 4


def ask_by_name(model: ModelRef, *, seq_len: int) -> SelfTestReport | None:
    """Loads a model and asks it; None when its float32 weights do not fit into memory."""
    stored = sum(
        path.stat().st_size for path in Path(model.name).expanduser().glob("*.safetensors")
    )  # nothing for a hub id
    if 2 * stored > _free_bytes():
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    loaded = model.load()
    return ask_model(loaded, seq_len=seq_len, with_gradients=has_room_for_gradients(loaded))


def has_room_for_gradients(model: nn.Module) -> bool:
    """Whether another float32 copy of the parameters fits into memory, with as much again to work in."""
    return sum(value.numel() for value in model.parameters()) * 2 * _BYTES_PER_PARAMETER < _free_bytes()


def agree_on_recipe(load: Callable[[], nn.Module], *, seq_len: int, rank: int, world_size: int) -> LossRecipe:
    """Rank 0 asks the whole model, before a plan or a placement touches it; all ranks get the answer.

    Raises:
        ModelError: On every rank, when the model's loss cannot be computed exactly.
    """

    def ask() -> LossRecipe:
        causal_lm = load()
        report = ask_model(
            causal_lm, seq_len=seq_len, with_gradients=world_size == 1 and has_room_for_gradients(causal_lm)
        )
        logger.info("self-test: %s", report.sentence)
        return report.recipe

    return _told_by_rank_0(ask if rank == 0 else None, world_size)


def agree_on_document_fault(
    load: Callable[[], nn.Module], recipe: LossRecipe, attention: str, *, seq_len: int, rank: int, world_size: int
) -> str | None:
    """What rank 0 finds when it asks the whole model for `find_document_fault`, on every rank."""

    def ask() -> str | None:
        return find_document_fault(load(), recipe, attention, seq_len=seq_len)

    fault: str | None = _told_by_rank_0(ask if rank == 0 else None, world_size)
    return fault


def find_document_fault(causal_lm: nn.Module, recipe: LossRecipe, attention: str, *, seq_len: int) -> str | None:
    """Why attention that reads each document alone does not give the recipe's loss; None when it does.

    Args:
        causal_lm: Whole, on a CPU, and asked there: what it hands its layers is the same on a GPU.
        recipe: How its loss is computed.
        attention: `varlen`, `segmented` or `flex`.
        seq_len: Tokens per row.
    """
    name = FLEX if attention == "flex" else SEGMENTED
    before = causal_lm.config._attn_implementation
    was_training = causal_lm.training
    try:
        set_attention(causal_lm, name)
        if causal_lm.config._attn_implementation != name:
            return f"{type(causal_lm).__name__} has attention of its own"
        model = LossModel(causal_lm, recipe)
        with torch.no_grad(), uncompiled():
            model.train()(make_documents(causal_lm, seq_len, with_window=False).trial(recipe.rows))
        dtype = next(causal_lm.parameters()).dtype
        confirm_recipe(model, seq_len=seq_len, dtype=dtype, with_window=True)
    except (*CANNOT_RUN, ModelError) as error:
        return first_line(error)
    finally:
        try_set_attention(causal_lm, before)
        causal_lm.train(was_training)
    return None


def find_blocks_fault(skeleton: nn.Module, recipe: LossRecipe) -> str | None:
    """Why the layers of a model without the memory of its weights cannot have attention in blocks; None when they can.

    They are run over a few random numbers: what a layer asks of attention does not depend on them.
    """
    positions = None if recipe.rows == "alone" else torch.arange(8)[None] % 4
    with hollow_values(skeleton):
        fault = run_in_blocks(skeleton, torch.zeros(1, 8, dtype=torch.int64), positions)
    return None if fault is None else first_line(fault)


def prove_loss(model: LossModel, state: TrainState, *, seq_len: int, dtype: torch.dtype, world_size: int) -> TrainState:
    """Asks the placed model, and binds the run to the recipe.

    Raises:
        ModelError: On every rank, when the recipe is not exact on the placed model.
        CheckpointError: When the checkpoint at hand was trained by another loss.
    """
    check_same_recipe(state, model, seq_len)
    fault, difference = None, 0.0
    try:
        alone, found = confirm_recipe(model, seq_len=seq_len, dtype=dtype)
        difference = abs(found - alone)
    except ModelError as error:
        fault = error
    fault = _told_by_rank_0(lambda: fault, world_size)
    if fault is not None:
        raise ModelError(*fault.args)
    return state.model_copy(
        update={
            "loss_recipe": model.recipe.text,
            "self_tests": state.self_tests + 1,
            "self_test_difference": max(state.self_test_difference, difference),
        }
    )


def check_same_recipe(state: TrainState, model: LossModel, seq_len: int) -> None:
    """Raises `CheckpointError` when a checkpoint was trained by another loss than the model's recipe."""
    if state.step == 0 or state.loss_recipe == model.recipe.text:
        return
    if not state.loss_recipe and computes_as_before(model, seq_len):
        return
    earlier = state.loss_recipe or "one dense mask over packed rows and no more than the head's weight"
    raise CheckpointError(
        f"checkpoint at step {state.step}: it was trained by another loss ({earlier}) than the one that is exact for"
        f" this model ({model.recipe.text}); start anew under another name"
    )


def computes_as_before(model: LossModel, seq_len: int) -> bool:
    """Whether versions that asked nothing gave this model's loss: full attention in each document, a head without bias."""
    recipe, config = model.recipe, model.causal_lm.config
    head = find_decoder_parts(model.causal_lm).lm_head
    window = find_shortest_window(config.get_text_config().to_dict())
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return (
        (recipe.rows, recipe.attention, recipe.head.kind) == ("packed", "any", "linear")
        and getattr(head, "bias", None) is None
        and (window is None or window >= seq_len)
        and abs(recipe.head.factor - factor) <= 1e-5 * abs(factor)
        and recipe.head.softcap == getattr(config, "final_logit_softcapping", None)
    )


def _told_by_rank_0(ask: Callable[[], Any] | None, world_size: int) -> Any:
    """What rank 0 finds, on every rank; an error of ours is raised on every rank."""
    answer: list[Any] = [None, None]
    if ask is not None and (world_size == 1 or dist.get_rank() == 0):
        try:
            answer[0] = ask()
        except ModelError as error:
            answer[1] = error.args
    if world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise ModelError(*answer[1])
    return answer[0]


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
