"""transformers as the engine: the oracle of the vLLM one, and for models vLLM does not have.

When only the letters are wanted, one forward pass computes logits at the last position alone; the full (batch, length,
vocabulary) array, which dominates the cost of scoring with a small model, is never made, and what prompts share at their
beginning is computed once (`eval/next_token.py`). Prompts that are continued go through the model with others of exactly
their length, so there is no padding and no mask: what a prompt gets does not depend on its neighbours beyond the rounding
of a larger matrix product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from eval.engine import EngineAnswer, EngineSpec
from eval.next_token import LIMITS, NextTokenReader, iter_equal_lengths
from layerplan.config.evaluation import settle_dtype


class TransformersEngine:
    """One model on one device."""

    def __init__(self, spec: EngineSpec) -> None:
        self._device = torch.device("cuda" if spec.num_gpus > 0 and torch.cuda.is_available() else "cpu")
        dtype = choose_dtype(spec.dtype, self._device)
        self._model = spec.model.load(dtype=dtype).to(self._device)
        self._tokenizer = spec.model.tokenizer()
        self._letter_ids = list(spec.letter_ids)
        self.reader = NextTokenReader(self._model, self._letter_ids, self._device)
        self._end_ids = _find_end_ids(self._model, self._tokenizer)

    @torch.inference_mode()
    def ask(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[EngineAnswer]:
        """Answers every prompt greedily, in order."""
        answers: dict[int, EngineAnswer] = {}
        by_limit: dict[int, list[int]] = defaultdict(list)
        for index, limit in enumerate(max_new_tokens):
            by_limit[limit].append(index)
        read = by_limit.pop(1, [])
        for members, logits in self.reader.read([prompt_ids[index] for index in read]):
            found = self._pack(logits, logits.argmax(-1, keepdim=True))
            answers.update(zip((read[member] for member in members), found, strict=True))
        lengths = [len(ids) for ids in prompt_ids]
        for limit, members in sorted(by_limit.items()):
            for batch in iter_equal_lengths(lengths, members, max_tokens=LIMITS[self._device.type].tokens):
                ids = torch.tensor([list(prompt_ids[index]) for index in batch], device=self._device)
                answers.update(zip(batch, self._generate(ids, limit), strict=True))
        return [answers[index] for index in range(len(prompt_ids))]

    def _generate(self, batch: torch.Tensor, limit: int) -> list[EngineAnswer]:
        out = self._model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=limit,
            eos_token_id=sorted(self._end_ids) or None,
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
    """The dtype of a config's `dtype` on a device."""
    chosen = settle_dtype(name, on_gpu=device.type != "cpu")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[chosen]


def _find_end_ids(model: torch.nn.Module, tokenizer: Any) -> set[int]:
    """Where an answer ends: what the generation config says, and the tokenizer's own end, as vLLM has it."""
    said = getattr(model.generation_config, "eos_token_id", None)
    found = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    return {int(token) for token in found if token is not None}
