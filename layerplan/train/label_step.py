"""The step on prompts with a label: a micro-batch trains from its own start layer, on the one position that has a label.

What lies below a start layer runs without a graph: the grad mode is off until the layer is entered, so nothing below it
saves an activation or asks for a gradient, sharded or not, compiled or not. Shapes: B rows, T tokens, N labels, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerplan.config.train import TrainConfig
from layerplan.corpus.rows import PackedRows
from layerplan.errors import TrainingError
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.freezing import AppliedPlan
from layerplan.models.head import run_to_head
from layerplan.models.semantic_bases import SemanticBases
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.train.loss import IGNORED
from layerplan.train.request import LabelOptions
from layerplan.train.semantic_loss import compute_cosine_loss_sum, compute_similarity_loss_sum
from layerplan.train.state import TrainState
from layerplan.train.step import LossModel, TensorBatch


class LabelLossModel(LossModel):
    """A `LossModel` whose micro-batches carry a start layer; those without one are treated as its parent does."""

    def __init__(
        self,
        causal_lm: nn.Module,
        recipe: LossRecipe | None = None,
        *,
        options: LabelOptions,
        z_weight: float = 0.0,
        compiled: bool = False,
    ) -> None:
        super().__init__(causal_lm, recipe, z_weight=z_weight, compiled=compiled)
        parts = find_decoder_parts(causal_lm)
        self.options = options
        self._layers_path = parts.layers_path
        self._trained = {
            index: [parameter for parameter in layer.parameters() if parameter.requires_grad]
            for index, layer in enumerate(parts.layers)
        }
        self._entered = _GradSwitch(parts.layers)
        self._bases: SemanticBases | None = None
        self._propagated = torch.zeros(len(self._trained), dtype=torch.int64)
        if options.loss != "vocabulary":
            _check_bases(options.loss, self.recipe, head_trains=parts.lm_head.weight.requires_grad)

    def forward(self, batch: TensorBatch, scale: float = 1.0, *, naive: bool = False) -> Tensor:
        """Returns the sum of the losses at the labels, float32; arguments as of the parent."""
        if batch.start_layer is None:
            return super().forward(batch, scale, naive=naive)
        if torch.is_grad_enabled():
            self._propagated[batch.start_layer] += batch.num_labels
        with self._starting_at(batch.start_layer):
            return self._compute(batch, scale)

    def makes_several(self, config: TrainConfig, world_size: int) -> bool:
        """Prompts with different start layers are never one micro-batch."""
        return True

    def make_batches(self, rows: PackedRows, size: int, device: torch.device) -> list[TensorBatch]:
        """Micro-batches of one start layer each."""
        if rows.start_layers is None:
            return super().make_batches(rows, size, device)
        return make_label_batches(rows, size, device)

    def list_starts(self, rows: PackedRows) -> tuple[int, ...]:
        """The start layers of a step's rows, the same on every rank."""
        return () if rows.start_layers is None else tuple(np.unique(rows.start_layers).tolist())

    def expect_gradients(self, applied: AppliedPlan, starts: Sequence[int]) -> AppliedPlan:
        """What of a plan a step with these start layers moves."""
        if not starts:
            return applied
        reached = set(starts) if self.options.trains_alone else set(range(min(starts), len(self._trained)))
        prefixes = tuple(f"{self._layers_path}.{index}." for index in self._trained if index not in reached)
        below = frozenset(name for name in applied.trainable if name.startswith(prefixes))
        return replace(applied, trainable=applied.trainable - below, frozen=applied.frozen | below)

    def start_counting(self, state: TrainState, world_size: int) -> Callable[[TrainState], TrainState]:
        """Counts rows by the layer their backward pass ends at, on top of those of a state, over all ranks."""
        before = state.propagated_rows or (0,) * len(self._trained)
        self._propagated.zero_()

        def count(reached: TrainState) -> TrainState:
            total = self._propagated.clone()
            if world_size > 1:
                dist.all_reduce(total)
            rows = tuple(old + new for old, new in zip(before, total.tolist(), strict=True))
            return reached.model_copy(update={"propagated_rows": rows})

        return count

    def _compute(self, batch: TensorBatch, scale: float) -> Tensor:
        asked_N = batch.asked_N
        labels_N = batch.labels_BT.flatten()[asked_N]
        if self.recipe.head.kind == "own" and self.options.loss == "vocabulary":
            logits_NV = self.causal_lm(**self.make_inputs(batch)).logits.flatten(0, 1)[asked_N]
            return torch.nn.functional.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
        head = self.causal_lm.get_submodule(self._head_path)
        hidden_BTD = run_to_head(self.causal_lm, head, self.make_inputs(batch))
        hidden_ND = hidden_BTD.flatten(0, 1)[asked_N]
        if self.options.loss == "vocabulary":
            return self.compute_loss(hidden_ND, labels_N, scale)
        if self._bases is None:
            self._bases = SemanticBases(head.weight)
        units_VD = self._bases.get_units()
        if self.options.loss == "semantic_cosine":
            return compute_cosine_loss_sum(hidden_ND, units_VD, labels_N)
        return compute_similarity_loss_sum(hidden_ND, units_VD, labels_N, scale=scale)

    @contextmanager
    def _starting_at(self, start: int) -> Iterator[None]:
        """Runs what lies below a layer without a graph and, for LIFT, what lies above it without gradients of its weights."""
        others = [each for index, each in self._trained.items() if index != start] if self.options.trains_alone else []
        for parameter in (parameter for each in others for parameter in each):
            parameter.requires_grad_(False)
        try:
            with self._entered.below(start):
                yield
        finally:
            for parameter in (parameter for each in others for parameter in each):
                parameter.requires_grad_(True)


def _check_bases(loss: str, recipe: LossRecipe, *, head_trains: bool) -> None:
    """Refuses a head whose labels have no fixed bases."""
    if head_trains:
        raise TrainingError(f"finetune.loss={loss}: the head trains, and its labels' bases would move")
    if recipe.head.kind == "own":
        raise TrainingError(
            f"finetune.loss={loss}: the model's head is more than one matrix, whose labels have no bases; use vocabulary"
        )


class _GradSwitch:
    """Turns the grad mode, off below a layer, on again when that layer is entered."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._start = 0
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._make_hook(index), prepend=True)

    @contextmanager
    def below(self, start: int) -> Iterator[None]:
        """Within it, layers below the start layer record nothing; without effect where nothing is recorded anyway."""
        was_on = torch.is_grad_enabled()
        self._start = start if was_on else 0
        try:
            torch.set_grad_enabled(was_on and start == 0)
            yield
        finally:
            self._start = 0
            torch.set_grad_enabled(was_on)

    def _make_hook(self, index: int) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            if self._start and index == self._start:
                torch.set_grad_enabled(True)

        return enter


def make_label_batches(rows: PackedRows, size: int, device: torch.device) -> list[TensorBatch]:
    """Cuts a rank's rows into micro-batches of at most `size` rows, each of one start layer and as long as its longest.

    Every rank has as many rows of each start layer (`LabelOrder.rank_rows_at`), and so as many micro-batches of it.
    """
    assert rows.start_layers is not None
    batches = []
    for start in np.unique(rows.start_layers):
        same = rows.select(np.flatnonzero(rows.start_layers == start))
        batches += [_make_batch(piece, int(start), device) for piece in same.split(size)]
    return batches


def _make_batch(rows: PackedRows, start: int, device: torch.device) -> TensorBatch:
    """Prompts without their label, which no position reads; it is what the last position of each prompt is asked."""
    used = (rows.document_ids >= 0).sum(axis=1)
    ids = torch.from_numpy(np.ascontiguousarray(rows.input_ids[:, : max(int(used.max()) - 1, 1)], dtype=np.int64))
    labels = torch.full_like(ids, IGNORED)
    for row in np.flatnonzero(used):
        labels[row, used[row] - 2] = int(rows.input_ids[row, used[row] - 1])
    asked = (labels.flatten() != IGNORED).nonzero()[:, 0]
    return TensorBatch(ids.to(device), None, labels.to(device), len(asked), start, asked.to(device))
