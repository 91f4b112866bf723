"""vLLM as the engine of both protocols: one pass gives the letters' log-probabilities and the generated answer.

Beside the hybrid's own model (`layerplan/models/hybrid/vllm_model.py`) the only module that imports vllm. On a CPU the
engine runs in float32 and in this process, which starts much faster than with a process of its own. Prompts of one subject
begin alike; vLLM keeps that beginning (prefix caching) where the model says that it may: what it carries from token to
token is keys and values alone, and no state.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from eval.engine import EngineAnswer, EngineSpec
from layerplan.config.evaluation import settle_dtype
from layerplan.errors import EvaluationError
from layerplan.models.own_types import HYBRID_CLASS, HYBRID_TYPE, make_known


def register_own_models() -> None:
    """Makes the hybrid known to vLLM; called by vLLM itself, in each of its processes, where the package is installed."""
    from vllm import ModelRegistry

    make_known(HYBRID_TYPE)
    ModelRegistry.register_model(HYBRID_CLASS, "layerplan.models.hybrid.vllm_model:VllmHybridForCausalLM")


def register_hybrid() -> None:
    """The same in this process, where a job ships the package as its working directory.

    With the class and not its name: vLLM looks at a named one in a process of its own, which has no such directory.
    """
    from vllm import ModelRegistry

    from layerplan.models.hybrid.vllm_model import VllmHybridForCausalLM

    make_known(HYBRID_TYPE)
    ModelRegistry.register_model(HYBRID_CLASS, VllmHybridForCausalLM)


class VllmEngine:
    """One vLLM engine, tensor parallel over its GPUs."""

    def __init__(self, spec: EngineSpec) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, EngineArgs

        is_hybrid = spec.model.config()["model_type"] == HYBRID_TYPE
        if is_hybrid:
            register_hybrid()
        on_cpu = spec.num_gpus <= 0
        options: dict[str, Any] = {
            "model": spec.model.name,
            "revision": spec.model.revision,
            "trust_remote_code": spec.model.trust_remote_code,
            "dtype": settle_dtype(spec.dtype, on_gpu=not on_cpu),
            "seed": 0,
            "max_model_len": spec.max_length,
            "disable_log_stats": True,
        }
        options |= {"enforce_eager": True} if on_cpu else {"tensor_parallel_size": max(1, int(spec.num_gpus))}
        if is_hybrid:  # a state sums up too much for fewer bits
            options |= {"mamba_ssm_cache_dtype": "float32"}
        try:
            shares = not is_hybrid and may_keep_beginnings(EngineArgs(**options).create_model_config())
            self._engine = LLM(**options, enable_prefix_caching=shares, use_tqdm_on_load=sys.stderr.isatty())
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise EvaluationError(
                f"vLLM cannot start on {spec.model}: {lines[-1][:300] if lines else type(error).__name__};"
                " evaluation.backend: transformers scores whatever was trained"
            ) from error
        self._letter_ids = spec.letter_ids
        self._tokenizer = spec.model.tokenizer()

    def ask(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[EngineAnswer]:
        """Answers every prompt greedily, in order."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                temperature=0.0, max_tokens=limit, logprob_token_ids=list(self._letter_ids), detokenize=False
            )
            for limit in max_new_tokens
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = self._engine.generate(prompts, sampling, use_tqdm=False)
        return [self._read(output.outputs[0]) for output in outputs]

    def _read(self, completion: Any) -> EngineAnswer:
        first = completion.logprobs[0]
        ids = list(completion.token_ids)
        if completion.finish_reason == "stop":
            ids = ids[:-1]
        # decoded as the other engine does: vLLM's own incremental text holds back bytes that end no character
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return EngineAnswer(tuple(float(first[token].logprob) for token in self._letter_ids), ids, text)


def may_keep_beginnings(config: Any) -> bool:
    """Whether vLLM's config of a model allows prefix caching, and its class carries no state beside keys and values.

    For layers with a state (Mamba and the like) vLLM keeps snapshots at block ends, which it calls experimental.
    """
    return bool(config.is_prefix_caching_supported) and not config.has_inner_state
