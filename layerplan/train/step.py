"""The pure training step: a model that returns its loss on documents, and the gradients of one optimizer step.

No Ray here: one process on a CPU or a GPU can run and measure it. A frozen prefix needs no `no_grad` of its own: with
neither its input nor its weights asking for gradients, autograd records nothing and the compiler builds a forward-only
graph. Documents of a packed row are told apart by positions that restart: from those, with no mask and no cache given,
`transformers` makes the masks that each of its layers means, windows and chunks included. Shapes: B rows, T tokens,
D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PackedRows, join_documents
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.document_starts import find_start_arguments, mark_starts
from layerplan.models.freezing import AppliedPlan
from layerplan.models.head import make_inputs, run_to_head
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.train.attention import prefer_cudnn
from layerplan.train.document_attention import OFFSETS, WHOLE_ROWS, attends_by_document, find_offsets
from layerplan.train.flex_documents import attends_by_blocks, find_windows, make_masks
from layerplan.train.loss import IGNORED, LossOptions, compute_loss_sum, make_labels
from layerplan.train.state import TrainState


class LossModel(nn.Module):
    """A transformers model whose forward pass returns the summed loss, so that FSDP's root sees one module."""

    def __init__(
        self,
        causal_lm: nn.Module,
        recipe: LossRecipe | None = None,
        *,
        z_weight: float = 0.0,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.recipe = recipe or LossRecipe()
        self._head_path = find_decoder_parts(causal_lm).lm_head_path
        self._windows = find_windows(causal_lm)
        self._start_arguments = find_start_arguments(causal_lm) if self.recipe.rows == "reset" else ()
        self._loss_options = LossOptions(self.recipe.head.softcap, z_weight, compiled)

    def forward(self, batch: TensorBatch, scale: float = 1.0, *, naive: bool = False) -> Tensor:
        """Returns the sum of the next-token losses, float32.

        Args:
            batch: Micro-batch.
            scale: As in `compute_loss_sum`.
            naive: Through the model's own logits, all of them at once: what the self-test compares with.
        """
        if batch.cached is not None:
            with batch.cached.running(batch.labels_BT.device):
                return self.forward(replace(batch, cached=None), scale, naive=naive)
        inputs = self.make_inputs(batch)
        labels_N = batch.labels_BT.flatten()
        if naive or self.recipe.head.kind == "own":
            return _sum_plain_loss(self.causal_lm(**inputs).logits.flatten(0, 1), labels_N, self._loss_options.z_weight)
        head = self.causal_lm.get_submodule(self._head_path)
        return self.compute_loss(run_to_head(self.causal_lm, head, inputs).flatten(0, 1), labels_N, scale)

    def make_batches(self, rows: PackedRows, size: int, device: torch.device) -> list[TensorBatch]:
        """Cuts a rank's rows into micro-batches of at most `size` rows."""
        return make_batches(rows, size, self.recipe, device)

    def makes_several(self, config: TrainConfig, world_size: int) -> bool:
        """Whether a worker's step may be more than one micro-batch, whose gradients add up."""
        return makes_several(self.recipe, config, world_size)

    def list_starts(self, rows: PackedRows) -> tuple[int, ...]:
        """Layers that a step's micro-batches start to train at, where they differ from the plan's own."""
        return ()

    def expect_gradients(self, applied: AppliedPlan, starts: Sequence[int]) -> AppliedPlan:
        """What of a plan a step moves."""
        return applied

    def start_counting(self, state: TrainState, world_size: int) -> Callable[[TrainState], TrainState]:
        """What puts into a state how much was trained since another; called on every rank."""
        return lambda reached: reached

    def make_inputs(self, batch: TensorBatch) -> dict[str, Any]:
        """What the model is called with: tokens, positions, and where documents start, for whoever asks for it."""
        inputs = make_inputs(self.causal_lm, batch.input_ids_BT, batch.position_ids_BT)
        if self.recipe.rows == "reset" and batch.position_ids_BT is not None:
            inputs |= mark_starts(self._start_arguments, batch.position_ids_BT)
        if attends_by_document(self.causal_lm):
            inputs[OFFSETS] = WHOLE_ROWS if batch.position_ids_BT is None else batch.find_offsets()
        elif attends_by_blocks(self.causal_lm):
            size = tuple(batch.input_ids_BT.shape)
            inputs[OFFSETS] = (
                make_masks(batch.position_ids_BT, size, self._windows, batch.input_ids_BT.device) or WHOLE_ROWS
            )
        return inputs

    def compute_loss(self, hidden_ND: Tensor, labels_N: Tensor, scale: float) -> Tensor:
        """The summed cross-entropy of states that enter the head, by the recipe's linear head."""
        head = self.causal_lm.get_submodule(self._head_path)
        factor = self.recipe.head.factor
        bias_V = head.bias
        if factor != 1.0:
            hidden_ND = hidden_ND * factor
            bias_V = None if bias_V is None else bias_V * factor
        weight_VD = head.weight.to(hidden_ND.dtype)
        return compute_loss_sum(hidden_ND, weight_VD, labels_N, bias_V, scale=scale, options=self._loss_options)


def _sum_plain_loss(logits_NV: Tensor, labels_N: Tensor, z_weight: float) -> Tensor:
    logits_NV = logits_NV.float()
    total = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="sum")
    if z_weight:
        total = total + z_weight * (logits_NV.logsumexp(-1).square() * (labels_N != IGNORED)).sum()
    return total


class CachedStates(Protocol):
    """How a micro-batch goes through the frozen prefix (`layerplan/train/prefix_cache.py`)."""

    def running(self, device: torch.device) -> AbstractContextManager[None]:
        """Within it the model runs so."""
        ...


@dataclass(frozen=True)
class TensorBatch:
    """One micro-batch on its device, all (B, T) int64."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor | None
    """They restart at every document of a packed row; None where every row is one document."""
    labels_BT: Tensor
    num_labels: int
    """Positions that have a label."""
    start_layer: int | None = None
    """Decoder layer that training starts at, for prompts with a label; None leaves it to the plan."""
    asked_N: Tensor | None = None
    """With a start layer: the positions that have a label, counted row after row."""
    offsets: Tensor | None = None
    """Where documents start in the flattened rows (`find_offsets`), int32; None where nobody wrote it down."""
    cached: CachedStates | None = None
    """What is known of its rows' states above the frozen prefix; None where nothing is kept of them."""

    def find_offsets(self) -> Tensor:
        """Where documents start; asks the device when they did not come with the rows."""
        if self.offsets is not None:
            return self.offsets
        assert self.position_ids_BT is not None
        is_start = (self.position_ids_BT == 0).cpu().numpy()
        return torch.from_numpy(find_offsets(is_start)).to(self.input_ids_BT.device)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that lie on the device."""
        return [each for each in vars(self).values() if isinstance(each, Tensor)]


def make_batch(rows: PackedRows, device: torch.device) -> TensorBatch:
    """Moves packed rows to a device and gives them labels."""
    input_ids, document_ids = _load(rows.input_ids), _load(rows.document_ids)
    is_whole = bool((rows.position_ids == np.arange(rows.position_ids.shape[1])).all())
    position_ids = None if is_whole else _load(rows.position_ids)
    is_start = np.diff(rows.document_ids, prepend=-2) != 0
    return _finish_batch(input_ids, position_ids, make_labels(input_ids, document_ids), device, is_start)


def make_batches(rows: PackedRows, size: int, recipe: LossRecipe, device: torch.device) -> list[TensorBatch]:
    """Cuts a rank's rows into micro-batches of at most `size` rows, or of as many tokens where documents stand alone.

    Where a model is given the starts of documents, each row is a micro-batch: starts are counted along one row.
    """
    if recipe.rows == "whole":
        return [make_batch(piece, device) for piece in join_documents(rows).split(size)]
    if recipe.rows != "alone":
        return [make_batch(piece, device) for piece in rows.split(size if recipe.rows == "packed" else 1)]
    documents = sorted(_split_documents(rows), key=len, reverse=True)
    limit = size * rows.input_ids.shape[1]
    batches, start = [], 0
    while start < len(documents):
        stop = start + max(1, limit // len(documents[start]))
        batches.append(_make_alone(documents[start:stop], device))
        start = stop
    return batches or [make_blank_batch(device)]


def makes_several(recipe: LossRecipe, config: TrainConfig, world_size: int) -> bool:
    """Whether a worker's rows of a step may be more than one micro-batch (`make_batches`)."""
    rows_at_once = {"alone": 0, "reset": 1}.get(recipe.rows, config.micro_rows)
    return config.global_batch_size > world_size * rows_at_once


def make_blank_batch(device: torch.device) -> TensorBatch:
    """One token without a label: what a rank runs while others have more micro-batches than it."""
    one = torch.zeros((1, 1), dtype=torch.int64)
    return _finish_batch(one, None, torch.full_like(one, IGNORED), device)


def fill_up(batches: list[TensorBatch], count: int, device: torch.device) -> list[TensorBatch]:
    """As many micro-batches as the rank that has most: sharded layers are gathered together."""
    missing = count - len(batches)
    return batches + [make_blank_batch(device)] * missing if missing > 0 else batches


def _split_documents(rows: PackedRows) -> list[NDArray[np.int32]]:
    """Every document of every row that has something to predict, in order."""
    documents = []
    for ids, marks in zip(rows.input_ids, rows.document_ids):
        starts = np.flatnonzero(np.diff(marks, prepend=marks[0] - 1))
        for start, stop in zip(starts, [*starts[1:], len(ids)]):
            if marks[start] >= 0 and stop - start > 1:
                documents.append(ids[start:stop])
    return documents


def _make_alone(documents: list[NDArray[np.int32]], device: torch.device) -> TensorBatch:
    """Documents as rows of the length of the first, the longest; what is behind the end of one is never looked at."""
    ids = torch.zeros((len(documents), len(documents[0])), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, document in enumerate(documents):
        tokens = _load(document)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens) - 1] = tokens[1:]
    return _finish_batch(ids, None, labels, device)


def _load(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))


def _finish_batch(
    input_ids: Tensor,
    position_ids: Tensor | None,
    labels: Tensor,
    device: torch.device,
    is_start: NDArray[np.bool_] | None = None,
) -> TensorBatch:
    """On the device; `is_start` marks documents' first tokens, and is left out where each row is one."""
    num_labels = int((labels != IGNORED).sum())
    offsets = None if is_start is None else torch.from_numpy(find_offsets(is_start))
    tensors = [input_ids, position_ids, labels, offsets]
    if device.type == "cuda":
        tensors = [None if each is None else each.pin_memory().to(device, non_blocking=True) for each in tensors]
    input_ids, position_ids, labels, offsets = tensors
    return TensorBatch(input_ids, position_ids, labels, num_labels, offsets=offsets)


def seed_device(seed: int, device: torch.device) -> None:
    """As `torch.manual_seed`, which on a CPU would also note for cards that are not there who asked: 1.6 ms a step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def accumulate_gradients(
    model: nn.Module, batches: Sequence[TensorBatch], scale: float, set_sync: Callable[[bool], None] | None = None
) -> Tensor:
    """Runs forward and backward on every micro-batch; gradients add up, communicated on the last one.

    Args:
        model: A `LossModel`, sharded or not.
        batches: Micro-batches of one optimizer step on this rank.
        scale: What the summed loss is multiplied by before backward.
        set_sync: Called with whether the next backward pass is the last of the step.

    Returns:
        The summed, unscaled loss of this rank, float32.
    """
    device = batches[0].labels_BT.device
    total = torch.zeros((), dtype=torch.float32, device=device)
    with prefer_cudnn(device):
        for index, batch in enumerate(batches):
            if set_sync is not None:
                set_sync(index == len(batches) - 1)
            loss = model(batch, scale)
            (loss * scale).backward()
            total += loss.detach()
    return total
