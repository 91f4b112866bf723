"""The pure training step: a model that returns its loss on packed rows, and the gradients of one optimizer step.

No Ray here: one process on a CPU or a GPU can run and measure it. A frozen prefix needs no `no_grad` of its own: with
neither its input nor its weights asking for gradients, autograd records nothing and the compiler builds a forward-only
graph. Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from layerplan.corpus.rows import PackedRows
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.train.attention import make_document_mask
from layerplan.train.loss import IGNORED, LossOptions, compute_loss_sum, make_labels

PREFIX = "causal_lm."
"""Parameter names of a `LossModel` carry it; Hugging Face names do not."""


class LossModel(nn.Module):
    """A transformers model whose forward pass returns the summed loss, so that FSDP's root sees one module."""

    def __init__(
        self, causal_lm: nn.Module, *, attention: str = "sdpa", z_weight: float = 0.0, compiled: bool = False
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._head_path = find_decoder_parts(causal_lm).lm_head_path
        self._attention = attention
        softcap = getattr(causal_lm.config, "final_logit_softcapping", None)
        self._loss_options = LossOptions(softcap, z_weight, compiled)
        self._logit_scale = float(getattr(causal_lm.config, "logit_scale", None) or 1.0)
        self._logit_scale /= float(getattr(causal_lm.config, "logits_scaling", None) or 1.0)

    def forward(self, batch: TensorBatch, scale: float = 1.0) -> Tensor:
        """Returns the sum of the next-token losses, float32; `scale` as in `compute_loss_sum`."""
        output = self.causal_lm.base_model(
            input_ids=batch.input_ids_BT,
            position_ids=batch.position_ids_BT,
            attention_mask=make_document_mask(batch.document_ids_BT, self._attention),
            use_cache=False,
        )
        hidden_ND = output.last_hidden_state.flatten(0, 1)
        if self._logit_scale != 1.0:
            hidden_ND = hidden_ND * self._logit_scale
        weight_VD = self.causal_lm.get_submodule(self._head_path).weight.to(hidden_ND.dtype)
        labels_N = batch.labels_BT.flatten()
        return compute_loss_sum(hidden_ND, weight_VD, labels_N, scale=scale, options=self._loss_options)


@dataclass(frozen=True)
class TensorBatch:
    """One micro-batch on its device, all (B, T) int64."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    document_ids_BT: Tensor
    labels_BT: Tensor
    num_labels: int
    """Positions that have a label."""


def make_batch(rows: PackedRows, device: torch.device) -> TensorBatch:
    """Moves packed rows to a device and gives them labels."""

    def load(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

    input_ids, document_ids = load(rows.input_ids), load(rows.document_ids)
    labels = make_labels(input_ids, document_ids)
    tensors = (input_ids, load(rows.position_ids), document_ids, labels)
    if device.type == "cuda":
        tensors = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return TensorBatch(*tensors, num_labels=int((labels != IGNORED).sum()))


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
    total = torch.zeros((), dtype=torch.float32, device=batches[0].labels_BT.device)
    for index, batch in enumerate(batches):
        if set_sync is not None:
            set_sync(index == len(batches) - 1)
        loss = model(batch, scale)
        (loss * scale).backward()
        total += loss.detach()
    return total
