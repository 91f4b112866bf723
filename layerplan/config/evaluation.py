"""Which questions are asked, how, and by which engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerplan.config.base import StrictModel


class BenchmarkConfig(StrictModel):
    """One multiple-choice benchmark."""

    name: Literal["ceval", "cmmlu"]
    """Which prompt, categories and averages apply."""
    path: str = "builtin"
    """`builtin` (the project's own small set in the C-Eval format) or a folder of CSV files."""
    split: str | None = None
    """Folder of the labelled questions; the benchmark's own default is `val` (C-Eval) or `test` (CMMLU)."""
    max_questions: int | None = Field(default=None, ge=1)
    """Ask only the first so many of each subject; the score then carries another protocol id."""


class EvaluationConfig(StrictModel):
    """Scoring of the base and the trained model."""

    benchmarks: list[BenchmarkConfig] = Field(default_factory=lambda: [BenchmarkConfig(name="ceval")], min_length=1)
    """Benchmarks, each scored by every protocol."""
    protocols: list[Literal["logit", "generate"]] = Field(default=["logit", "generate"], min_length=1)
    """`logit` compares the four letters' log-probabilities; `generate` decodes greedily and extracts an answer."""
    backend: Literal["vllm", "transformers"] = "vllm"
    """Engine that runs the model."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """`auto` is float32 on a CPU and bfloat16 on a GPU."""
    max_new_tokens: int = Field(default=16, ge=1)
    """Longest generated answer, in tokens."""
    batch_size: int = Field(default=64, ge=1)
    """Questions per batch handed to an engine."""
    num_actors: int = Field(default=1, ge=1)
    """Engines (data parallel)."""
    num_cpus_per_actor: float = Field(default=0.5, ge=0)
    """CPU share each engine reserves on Ray."""
    num_gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs each engine uses; above 1 it splits the model over them (tensor parallel)."""
    evaluate_base: bool = True
    """Score the untouched base too: it is arm zero of every verdict."""
