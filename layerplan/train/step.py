"""The pure training step: a model that returns its loss on packed rows, and one optimizer step around it.

No Ray here: one process on a CPU or a GPU can run and measure it. Shapes: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from layerplan.corpus.rows import PackedRows
from layerplan.models.causal_lm import find_decoder_parts
from layerplan.train.loss import IGNORED, compute_loss_sum, make_labels

PREFIX = "causal_lm."
"""Parameter names of a `LossModel` carry it; Hugging Face names do not."""


class LossModel(nn.Module):
    """A transformers model whose forward pass returns the summed loss, so that FSDP's root sees one module."""

    def __init__(self, causal_lm: nn.Module) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        parts = find_decoder_parts(causal_lm)
        self._head_path = parts.lm_head_path
        self._softcap = getattr(causal_lm.config, "final_logit_softcapping", None)

    def forward(self, input_ids_BT: Tensor, position_ids_BT: Tensor, document_ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
        """Returns the sum of the next-token losses, float32."""
        output = self.causal_lm.base_model(
            input_ids=input_ids_BT,
            position_ids=position_ids_BT,
            attention_mask=make_document_mask(document_ids_BT),
            use_cache=False,
        )
        hidden_ND = output.last_hidden_state.flatten(0, 1)
        weight_VD = self.causal_lm.get_submodule(self._head_path).weight
        return compute_loss_sum(hidden_ND, weight_VD.to(hidden_ND.dtype), labels_BT.flatten(), softcap=self._softcap)


@dataclass(frozen=True)
class TensorBatch:
    """One micro-batch on its device, all (B, T) int64."""

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    document_ids_BT: Tensor
    labels_BT: Tensor

    @property
    def num_labels(self) -> int:
        """Positions that have a label."""
        return int((self.labels_BT != IGNORED).sum())


def make_batch(rows: PackedRows, device: torch.device) -> TensorBatch:
    """Moves packed rows to a device and gives them labels."""

    def move(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device, non_blocking=True)

    input_ids, document_ids = move(rows.input_ids), move(rows.document_ids)
    return TensorBatch(input_ids, move(rows.position_ids), document_ids, make_labels(input_ids, document_ids))


def make_document_mask(document_ids_BT: Tensor) -> Tensor | None:
    """Returns the (B, 1, T, T) mask, True where a query may see a key: same document, not later.

    None when every row is one document, so that the plain causal kernel runs.
    """
    if bool((document_ids_BT == document_ids_BT[:, :1]).all()):
        return None
    same = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    return torch.tril(same)[:, None]


def accumulate_gradients(model: nn.Module, batches: Sequence[TensorBatch], scale: float) -> Tensor:
    """Runs forward and backward on every micro-batch; gradients add up, synchronised on the last one.

    Args:
        model: A `LossModel`, sharded or not.
        batches: Micro-batches of one optimizer step on this rank.
        scale: What the summed loss is multiplied by before backward.

    Returns:
        The summed, unscaled loss of this rank, float32.
    """
    total = torch.zeros((), dtype=torch.float32, device=batches[0].labels_BT.device)
    for index, batch in enumerate(batches):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(index == len(batches) - 1)
        loss = model(batch.input_ids_BT, batch.position_ids_BT, batch.document_ids_BT, batch.labels_BT)
        (loss * scale).backward()
        total += loss.detach()
    return total
