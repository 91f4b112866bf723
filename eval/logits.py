"""transformers as the engine: the oracle of the vLLM one, and for models vLLM does not have."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerplan.models.causal_lm import load_causal_lm, load_tokenizer


class TransformersEngine:
    """Same interface as the vLLM engine, one prompt at a time without padding."""

    def __init__(
        self, model: str, *, dtype: str, max_new_tokens: int, num_gpus: float, letter_ids: Sequence[int], revision: str
    ) -> None:
        self._device = torch.device("cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu")
        if dtype == "auto":
            dtype = "float32" if self._device.type == "cpu" else "bfloat16"
        self._model = load_causal_lm(model, revision=revision, dtype=getattr(torch, dtype)).to(self._device)
        self._tokenizer = load_tokenizer(model, revision=revision)
        self._letter_ids = list(letter_ids)
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def ask(self, prompt_ids: Sequence[Sequence[int]]) -> list[tuple[tuple[float, ...], str]]:
        """Asks every prompt greedily, in order."""
        return [self._ask_one(list(ids)) for ids in prompt_ids]

    def _ask_one(self, ids: list[int]) -> tuple[tuple[float, ...], str]:
        prompt = torch.tensor([ids], device=self._device)
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        first = torch.log_softmax(out.logits[0][0].float(), -1)
        text = self._tokenizer.decode(out.sequences[0, len(ids) :], skip_special_tokens=True)
        return tuple(float(first[token]) for token in self._letter_ids), text
