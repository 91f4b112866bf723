"""Next-token logits of many prompts, what prompts share computed once: a cache of keys and values, proved before it is used.

A group's shared tokens go through the model alone; the rests follow on copies of what the model kept of them, padded on the
right, where causal attention lets no token that is read see them. Whether a model can be continued so (windows, state,
positions counted from a mask) is asked of the model: the first prompts, and every prompt longer than any compared before,
are read without a cache too. Log-probabilities of the letters must agree, or that model's prompts are read whole from then on.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from eval.shared_prefix import PrefixGroup, group_by_prefix, split_members

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest difference of a letter's log-probability: rounding in another order, as two engines show it."""
REUSE_TOKENS = 32
"""A kept beginning so much shorter than the one at hand is used all the same."""


_Read = tuple[list[int], torch.Tensor]
"""Indices of prompts, and their logits (batch, vocabulary)."""


class Limits(NamedTuple):
    """What goes through a model at once."""

    tokens: int
    """Tokens computed in one pass."""
    held_tokens: int
    """Tokens whose keys and values a pass holds."""
    padding: int
    """Padding of one prompt: on a GPU a pass of its own costs more than it."""
    min_saved: int
    """Tokens that a shared beginning must save, to be worth a pass of its own."""


LIMITS = {
    "cpu": Limits(tokens=2_048, held_tokens=4_096, padding=16, min_saved=32),
    "cuda": Limits(tokens=32_768, held_tokens=32_768, padding=256, min_saved=1_024),
}
"""On a CPU activations of 2,048 tokens stay in the cache (a quarter less time than with 16,384)."""


class NextTokenReader:
    """Reads the logits after prompts; keeps the last shared beginning for prompts that come later."""

    def __init__(self, model: Any, letter_ids: Sequence[int], device: torch.device) -> None:
        self._model = model
        self._letter_ids = list(letter_ids)
        self._device = device
        self._limits = LIMITS[device.type]
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if keeps else {}
        self._is_shared = True
        self._compared_length = 0
        self._kept: tuple[list[int], Any] = ([], None)
        self.tokens_computed = 0
        """Tokens that went through the model, padding and comparisons included."""

    def read(self, prompts: Sequence[Sequence[int]]) -> Iterator[_Read]:
        """Yields indices of prompts and their logits (batch, vocabulary), each prompt once."""
        whole: list[int] = []
        groups = group_by_prefix(prompts, min_saved=self._limits.min_saved) if self._is_shared else []
        for group in groups:
            batches = self._read_group(prompts, group)
            first = self._take_first(prompts, group, batches) if group.num_shared and self._is_shared else None
            if first is None:
                whole += group.members
                continue
            yield first
            yield from batches
        yield from self._read_whole(prompts, whole if groups else range(len(prompts)))

    def _read_whole(self, prompts: Sequence[Sequence[int]], indices: Sequence[int]) -> Iterator[_Read]:
        for batch in iter_equal_lengths([len(ids) for ids in prompts], indices, max_tokens=self._limits.tokens):
            yield batch, self._compute([list(prompts[index]) for index in batch])

    def _compute(self, rows: list[list[int]]) -> torch.Tensor:
        batch = torch.tensor(rows, device=self._device)
        self.tokens_computed += batch.numel()
        return torch.as_tensor(self._model(input_ids=batch, use_cache=False, **self._last_only).logits[:, -1])

    def _read_group(self, prompts: Sequence[Sequence[int]], group: PrefixGroup) -> Iterator[_Read]:
        shared, kept = self._keep(list(prompts[group.members[0]][: group.num_shared]))
        group = PrefixGroup(len(shared), group.members)
        for batch in split_members(
            group,
            [len(ids) for ids in prompts],
            max_rest_tokens=self._limits.tokens,
            max_held_tokens=self._limits.held_tokens,
            max_padding=self._limits.padding,
        ):
            yield batch, self._continue(kept, [list(prompts[index][len(shared) :]) for index in batch])

    def _keep(self, shared: list[int]) -> tuple[list[int], Any]:
        """What the model keeps of a beginning, or of one a little shorter that was read before."""
        known, kept = self._kept
        if kept is None or shared[: len(known)] != known or len(shared) - len(known) > REUSE_TOKENS:
            self._kept = ([], None)  # the old one is let go before the new one is made
            kept = self._run([shared], None, [len(shared) - 1]).past_key_values
            self._kept = (shared, kept)
        return self._kept

    def _continue(self, kept: Any, rests: list[list[int]]) -> torch.Tensor:
        """Logits after each rest, on a copy of what was kept for each."""
        longest = max(map(len, rests))
        rows = [rest + [rest[-1]] * (longest - len(rest)) for rest in rests]
        last = [len(rest) - 1 for rest in rests]
        past = copy.deepcopy(kept)
        if len(rests) > 1:
            past.reorder_cache(torch.zeros(len(rests), dtype=torch.long, device=self._device))
        logits = self._run(rows, past, last).logits
        return torch.as_tensor(logits[:, 0] if logits.shape[1] == 1 else logits[range(len(rests)), last])

    def _run(self, rows: list[list[int]], past: Any, last: list[int]) -> Any:
        batch = torch.tensor(rows, device=self._device)
        self.tokens_computed += batch.numel()
        with reading_at(self._model, last):
            return self._model(input_ids=batch, past_key_values=past, use_cache=True)

    def _take_first(
        self, prompts: Sequence[Sequence[int]], group: PrefixGroup, batches: Iterator[_Read]
    ) -> _Read | None:
        """A group's first batch; of prompts longer than any before only when it is what whole prompts give."""
        longest = len(prompts[group.members[0]])
        if longest <= self._compared_length:
            return next(batches)
        try:
            batch, logits = next(batches)
            fault = self._compare([list(prompts[index]) for index in batch], logits)
        except Exception as error:  # a model's own code says in its own way that it cannot
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        self._compared_length = longest
        if fault is None:
            return batch, logits
        self._is_shared, self._kept = False, ([], None)
        logger.warning("prompts are read whole, since this model cannot go on after a kept beginning: %s", fault)
        return None

    def _compare(self, prompts: list[list[int]], logits: torch.Tensor) -> str | None:
        """Reads the longest and the shortest prompt of a batch whole; what differs, if anything does."""
        chosen = sorted({0, len(prompts) - 1})
        whole = torch.cat([self._compute([prompts[row]]) for row in chosen])
        difference = (self._letters(logits[chosen]) - self._letters(whole)).abs().max().item()
        bound = TOLERANCE[logits.dtype]
        return None if difference <= bound else f"letters differ by {difference:.1e}, {bound:.0e} is rounding"

    def _letters(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits.float(), -1)[:, self._letter_ids]


@contextmanager
def reading_at(model: Any, last: Sequence[int]) -> Iterator[None]:
    """Lets the model's head see one position of each row, where it takes (batch, length, hidden); others see all."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def choose(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = inputs[0]
        if hidden.dim() != 3 or len(hidden) != len(last):
            return None
        return (hidden[range(len(last)), list(last)].unsqueeze(1), *inputs[1:])

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def iter_equal_lengths(lengths: Sequence[int], indices: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Yields those indices in lists of equal length, each of at most `max_tokens` tokens."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index in indices:
        groups[lengths[index]].append(index)
    for length, members in sorted(groups.items()):
        size = max(1, max_tokens // max(1, length))
        for start in range(0, len(members), size):
            yield members[start : start + size]
