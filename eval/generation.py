"""vLLM as the engine of both protocols: one pass gives the letters' log-probabilities and the generated answer.

The only module that imports vllm. On a CPU the engine runs in float32 and in this process, which starts much faster
than with a process of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from layerplan.errors import EvaluationError


class VllmEngine:
    """One vLLM engine; `ask` returns the four letters' log-probabilities and the generated text per prompt."""

    def __init__(
        self, model: str, *, dtype: str, max_new_tokens: int, num_gpus: float, letter_ids: Sequence[int], revision: str
    ) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams

        on_cpu = num_gpus <= 0
        if dtype == "auto":
            dtype = "float32" if on_cpu else "bfloat16"
        options: dict[str, Any] = {"enforce_eager": True} if on_cpu else {"tensor_parallel_size": max(1, int(num_gpus))}
        try:
            self._engine = LLM(
                model=model,
                revision=revision,
                dtype=dtype,
                seed=0,
                disable_log_stats=True,
                use_tqdm_on_load=sys.stderr.isatty(),
                **options,
            )
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise EvaluationError(
                f"vLLM cannot start on {model}: {lines[-1] if lines else type(error).__name__}"
            ) from error
        self._letter_ids = list(letter_ids)
        self._sampling = SamplingParams(
            temperature=0.0, max_tokens=max_new_tokens, logprob_token_ids=list(letter_ids), detokenize=True
        )

    def ask(self, prompt_ids: Sequence[Sequence[int]]) -> list[tuple[tuple[float, ...], str]]:
        """Asks every prompt greedily, in order."""
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = self._engine.generate(prompts, self._sampling, use_tqdm=False)
        return [self._read(output.outputs[0]) for output in outputs]

    def _read(self, completion: Any) -> tuple[tuple[float, ...], str]:
        first = completion.logprobs[0]
        return tuple(float(first[token].logprob) for token in self._letter_ids), completion.text
