"""transformers as the engine: the oracle of the vLLM one, and for models vLLM does not have.

Prompts of exactly one length go through the model together, so there is no padding and no mask: what a prompt gets
does not depend on its neighbours beyond the rounding of a larger matrix product. When only the letters are wanted,
one forward pass computes logits at the last position alone; the full (batch, length, vocabulary) array, which
dominates the cost of scoring with a small model, is never made.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from eval.engine import EngineAnswer, EngineSpec

MAX_BATCH_TOKENS = {"cpu": 2_048, "cuda": 32_768}
"""Prompt tokens of one forward pass: on a CPU activations stay in the cache (a quarter less time than with 16,384)."""


class TransformersEngine:
    """One model on one device."""

    def __init__(self, spec: EngineSpec) -> None:
        self._device = torch.device("cuda" if spec.num_gpus > 0 and torch.cuda.is_available() else "cpu")
        dtype = choose_dtype(spec.dtype, self._device)
        self._model = spec.model.load(dtype=dtype).to(self._device)
        self._tokenizer = spec.model.tokenizer()
        self._letter_ids = list(spec.letter_ids)
        keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if keeps else {}
        self._end_ids = _find_end_ids(self._model)

    @torch.inference_mode()
    def ask(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[EngineAnswer]:
        """Answers every prompt greedily, in order."""
        answers: dict[int, EngineAnswer] = {}
        most = MAX_BATCH_TOKENS[self._device.type]
        for indices in iter_equal_lengths(prompt_ids, max_new_tokens, max_tokens=most):
            batch = torch.tensor([list(prompt_ids[index]) for index in indices], device=self._device)
            limit = max_new_tokens[indices[0]]
            found = self._read_letters(batch) if limit == 1 else self._generate(batch, limit)
            answers.update(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(prompt_ids))]

    def _read_letters(self, batch: torch.Tensor) -> list[EngineAnswer]:
        logits = self._model(input_ids=batch, use_cache=False, **self._last_only).logits[:, -1]
        return self._pack(logits, logits.argmax(-1, keepdim=True))

    def _generate(self, batch: torch.Tensor, limit: int) -> list[EngineAnswer]:
        out = self._model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=limit,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return self._pack(out.logits[0], out.sequences[:, batch.shape[1] :])

    def _pack(self, logits: torch.Tensor, generated: torch.Tensor) -> list[EngineAnswer]:
        """Letters out of (batch, vocabulary) logits, and text out of (batch, new tokens) ids."""
        letters = torch.log_softmax(logits.float(), -1)[:, self._letter_ids].tolist()
        cut = [self._cut(ids) for ids in generated.tolist()]
        texts = self._tokenizer.batch_decode(cut, skip_special_tokens=True)
        return [EngineAnswer(tuple(row), ids, text) for row, ids, text in zip(letters, cut, texts, strict=True)]

    def _cut(self, ids: list[int]) -> list[int]:
        for position, token in enumerate(ids):
            if token in self._end_ids:
                return ids[:position]
        return ids


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a config's `dtype`; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    chosen = ("float32" if device.type == "cpu" else "bfloat16") if name == "auto" else name
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[chosen]


def iter_equal_lengths(
    prompt_ids: Sequence[Sequence[int]], max_new_tokens: Sequence[int], *, max_tokens: int
) -> Iterator[list[int]]:
    """Yields lists of prompt indices whose lengths and limits are equal, each of at most `max_tokens` prompt tokens."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (ids, limit) in enumerate(zip(prompt_ids, max_new_tokens, strict=True)):
        groups[len(ids), limit].append(index)
    for (length, _), members in sorted(groups.items()):
        size = max(1, max_tokens // max(1, length))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _find_end_ids(model: torch.nn.Module) -> set[int]:
    value = getattr(model.generation_config, "eos_token_id", None)
    if value is None:
        return set()
    return {int(token) for token in value} if isinstance(value, list) else {int(value)}
