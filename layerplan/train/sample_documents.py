"""The few documents a model is asked about: random tokens, in the rows of each loss recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerplan.models.causal_lm import find_decoder_parts
from layerplan.models.positions import positions_of
from layerplan.train.loss import IGNORED
from layerplan.train.step import TensorBatch

LENGTHS = (10, 16)
"""Tokens of the test's documents."""
MAX_WINDOW_TOKENS = 4096 + 64
"""A longer window than this is not looked behind."""


@dataclass(frozen=True)
class Documents:
    """The test's documents, one row each, without padding."""

    ids: tuple[Tensor, ...]

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return sum(len(each) - 1 for each in self.ids)

    def alone(self) -> Iterator[TensorBatch]:
        """One batch per document, no positions given."""
        for each in self.ids:
            labels = torch.full_like(each, IGNORED)
            labels[:-1] = each[1:]
            yield TensorBatch(each[None], None, labels[None], len(each) - 1)

    def batch(self, rows: str, *, part: int | None = None, changed: bool = False) -> TensorBatch:
        """The documents as a recipe's rows.

        Args:
            rows: `packed` or `alone`.
            part: Labels of the second document alone, before this token of it; None labels everything.
            changed: Every token that these labels must not depend on is another one.
        """
        pieces = []
        for index, each in enumerate(self.ids):
            stop = 0 if part is not None and index != 1 else part
            labels = torch.full_like(each, IGNORED)
            labels[:-1] = each[1:]
            if stop is not None:
                labels[max(0, stop - 1) :] = IGNORED
            ids = each
            if changed:
                assert stop is not None, "only a part has something outside"
                ids = torch.cat([each[:stop], each[stop:].roll(1)])
            pieces.append((ids, torch.arange(len(each), device=each.device), labels))
        return _join(pieces) if rows == "packed" else _stack(pieces)

    def outside(self, rows: str, part: int) -> Tensor:
        """(B, T) bool: positions that the labels of `part` must not depend on."""
        marks = []
        for index, each in enumerate(self.ids):
            mark = torch.ones_like(each)
            if index == 1:
                mark[:part] = 0
            marks.append((mark, mark, mark))
        joined = _join(marks) if rows == "packed" else _stack(marks)
        return joined.input_ids_BT.bool()


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
    lengths = [min(length, longest) for length in LENGTHS]
    if with_window:
        window = find_shortest_window(config.to_dict())
        if window is not None and max(lengths) < window + 4 and window + 16 <= min(longest, MAX_WINDOW_TOKENS):
            lengths[1] = window + 16
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
    return Documents(tuple(documents))


def find_shortest_window(config: dict[str, Any]) -> int | None:
    """The smallest number of tokens that a window or a chunk is set to, by what configs call them, nested ones included."""
    sizes = (value for name, value in config.items() if re.search(r"(window|chunk)(_size)?$", str(name)))
    found = [value for value in sizes if isinstance(value, int) and not isinstance(value, bool) and value > 1]
    nested = [find_shortest_window(value) for value in config.values() if isinstance(value, dict)]
    return min([*found, *(window for window in nested if window is not None)], default=None)


def _join(pieces: list[tuple[Tensor, Tensor, Tensor]]) -> TensorBatch:
    ids, positions, labels = (torch.cat(each)[None] for each in zip(*pieces))
    return TensorBatch(ids, positions, labels, int((labels != IGNORED).sum()))


def _stack(pieces: list[tuple[Tensor, Tensor, Tensor]]) -> TensorBatch:
    pad: Callable[..., Tensor] = nn.utils.rnn.pad_sequence
    ids = pad([piece[0] for piece in pieces], batch_first=True)
    labels = pad([piece[2] for piece in pieces], batch_first=True, padding_value=IGNORED)
    return TensorBatch(ids, None, labels, int((labels != IGNORED).sum()))
