"""Documents packed in one row, and what a model of `transformers` says of each of them alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from layerplan.corpus.rows import PackedRows
from layerplan.train.step import LossModel, make_batch


def pack(lengths: Sequence[int]) -> PackedRows:
    """One row of documents of random tokens, ids 3 to 127."""
    ids = np.random.default_rng(0).integers(3, 128, (1, sum(lengths)), dtype=np.int32)
    documents = np.repeat(np.arange(len(lengths)), lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int32)
    return PackedRows(np.arange(1), ids, documents, positions)


def ask_alone(model: nn.Module, lengths: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The summed loss of the model's own logits in plain attention, a document at a time, and every parameter's gradient."""
    model.set_attn_implementation("eager")
    loss = torch.zeros(())
    for piece in np.split(pack(lengths).input_ids, np.cumsum(lengths)[:-1], axis=1):
        tokens = torch.from_numpy(piece.astype(np.int64))
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = loss + cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def check_packed(model: nn.Module, implementation: str, lengths: Sequence[int]) -> None:
    """Asserts that a packed row under an attention gives the loss and every gradient of its documents alone."""
    expected, wanted = ask_alone(model, lengths)
    names = dict(model.named_parameters())
    model.set_attn_implementation(implementation)
    found = LossModel(model)(make_batch(pack(lengths), torch.device("cpu")), naive=True)
    grads = torch.autograd.grad(found, list(names.values()))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, ours, theirs in zip(names, grads, wanted):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-5, name
