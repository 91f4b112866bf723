"""What every engine takes and gives, whichever library runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from layerplan.models.ref import ModelRef


@dataclass(frozen=True)
class EngineSpec:
    """Which model an engine loads, and how."""

    model: ModelRef
    backend: str
    """`vllm` or `transformers`."""
    dtype: str
    """`float32`, `bfloat16` or `auto`."""
    num_gpus: float
    """GPUs of one engine."""
    letter_ids: tuple[int, ...]
    """Tokens whose log-probabilities are asked for."""
    max_length: int
    """Longest prompt with its answer, in tokens."""
    num_threads: int | None = None
    """Threads on a CPU; the engine's share of the node's cores when left out."""
    num_engines: int = 1
    """Engines that share the cores."""


class EngineAnswer(NamedTuple):
    """What came back for one prompt."""

    letter_logprobs: tuple[float, ...]
    """Float32 log-probabilities of the spec's letters right after the prompt."""
    token_ids: list[int]
    """Greedy continuation, without the end-of-text token."""
    text: str
    """The same as text."""


class Engine(Protocol):
    """A loaded model."""

    def ask(self, prompt_ids: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> list[EngineAnswer]:
        """Answers every prompt greedily, in order; one limit of new tokens per prompt."""
        ...
