"""The few documents a model is asked about: random tokens, in the rows of each loss recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.positions import positions_of
from layerplan.plan.loss_recipe import Rows
from layerplan.train.loss import IGNORED
from layerplan.train.step import TensorBatch

LENGTH = 12
"""Tokens of each predicted document, where no window needs more."""
OTHER_LENGTH = 9
"""Tokens of the document before them in a packed row: both then start where no chunk of a power of two does."""
PADDING = 3
"""Tokens behind the end of the longest document that stands alone in its row, as training has them."""
MAX_WINDOW_TOKENS = 4096 + 64
"""A longer window than this is not looked behind."""


@dataclass(frozen=True)
class Documents:
    """The test's documents, (T,) each."""

    whole: Tensor
    """Every token of it is predicted."""
    part: Tensor
    """Its first half is predicted, and nothing behind that must matter."""
    other: Tensor
    """Nothing of it is predicted: it must not matter at all."""

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return sum(piece.num_labels for piece in self._pieces())

    def alone(self) -> Iterator[TensorBatch]:
        """Rows of one document, no positions given, nothing padded: documents of one length share a batch."""
        pieces = self._pieces()
        together = len(self.whole) == len(self.part)
        yield from (_stack(each) for each in ([pieces] if together else [[piece] for piece in pieces]))

    def trial(self, rows: Rows) -> TensorBatch:
        """The same labels in a recipe's rows, behind the other document; the part ends in other tokens."""
        return _arrange(self._trial_pieces(), rows)

    def outside(self, rows: Rows) -> Tensor:
        """(B, T) bool: the positions of `trial` that no label must depend on: none of their document's is at or behind them."""
        marks = [replace(piece, ids=piece.outside) for piece in self._trial_pieces()]
        return _arrange(marks, rows, fill=1).input_ids_BT.bool()

    def _pieces(self) -> list[_Piece]:
        return [_Piece(self.whole, len(self.whole) - 1), _Piece(self.part, max(0, len(self.part) // 2 - 1))]

    def _trial_pieces(self) -> list[_Piece]:
        whole, part = self._pieces()
        stop = part.num_labels + 1
        changed = torch.cat([part.ids[:stop], part.ids[stop:].roll(1)])
        return [_Piece(self.other, 0), replace(part, ids=changed), whole]


@dataclass(frozen=True)
class _Piece:
    """A document, of which so many tokens from the second on are predicted."""

    ids: Tensor
    num_labels: int

    @property
    def labels(self) -> Tensor:
        labels = torch.full_like(self.ids, IGNORED)
        labels[: self.num_labels] = self.ids[1 : self.num_labels + 1]
        return labels

    @property
    def outside(self) -> Tensor:
        """1 where no label is at or behind a position."""
        return (torch.arange(len(self.ids), device=self.ids.device) >= self.num_labels).long()


def make_documents(model: nn.Module, seq_len: int, *, with_window: bool = True) -> Documents:
    """Random tokens, each document ended as the corpus ends it.

    Args:
        model: Gives vocabulary, end of text and longest row.
        seq_len: Tokens per row of the run.
        with_window: Make one document reach beyond the shortest window that the run's rows can fill.
    """
    parts = find_decoder_parts(model)
    device = parts.embeddings.weight.device
    config = model.config.get_text_config()
    longest = min(seq_len, positions_of(config) or seq_len)
    lengths = [min(length, longest) for length in (LENGTH, LENGTH, OTHER_LENGTH)]
    if with_window:
        window = find_shortest_window(config.to_dict())
        if window is not None and lengths[0] < window + 4 and window + 16 <= min(longest, MAX_WINDOW_TOKENS):
            lengths[0] = window + 16
    generator = torch.Generator().manual_seed(0)
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    num_tokens = min(len(parts.embeddings.weight), len(parts.lm_head.weight))
    documents = []
    for length in lengths:
        ids = torch.randint(0, num_tokens, (length,), generator=generator)
        if isinstance(end, int) and 0 <= end < num_tokens:
            ids[-1] = end
        documents.append(ids.to(device))
    return Documents(*documents)


def find_shortest_window(config: dict[str, Any]) -> int | None:
    """The smallest number of tokens that a window or a chunk is set to, by what configs call them, nested ones included."""
    sizes = (value for name, value in config.items() if re.search(r"(window|chunk)(_size)?$", str(name)))
    found = [value for value in sizes if isinstance(value, int) and not isinstance(value, bool) and value > 1]
    nested = [find_shortest_window(value) for value in config.values() if isinstance(value, dict)]
    return min([*found, *(window for window in nested if window is not None)], default=None)


def _arrange(pieces: list[_Piece], rows: Rows, *, fill: int = 0) -> TensorBatch:
    return _stack(pieces, padding=PADDING, fill=fill) if rows in ("alone", "whole") else _join(pieces)


def _join(pieces: list[_Piece]) -> TensorBatch:
    """One packed row."""
    ids, labels = (torch.cat(each)[None] for each in zip(*((piece.ids, piece.labels) for piece in pieces)))
    positions = torch.cat([torch.arange(len(piece.ids), device=ids.device) for piece in pieces])
    return TensorBatch(ids, positions[None], labels, int((labels != IGNORED).sum()))


def _stack(pieces: list[_Piece], *, padding: int = 0, fill: int = 0) -> TensorBatch:
    """One document per row, filled up behind its end."""
    size = max(len(piece.ids) for piece in pieces) + padding
    ids = torch.stack([F.pad(piece.ids, (0, size - len(piece.ids)), value=fill) for piece in pieces])
    labels = torch.stack([F.pad(piece.labels, (0, size - len(piece.labels)), value=IGNORED) for piece in pieces])
    return TensorBatch(ids, None, labels, int((labels != IGNORED).sum()))
