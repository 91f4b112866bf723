"""Which questions are asked, how, and by which engine."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from layerplan.config.base import NAME_PATTERN, StrictModel
from layerplan.config.corpus import SourceConfig
from layerplan.config.labels import NodeLabels


def settle_dtype(dtype: str, *, on_gpu: bool) -> str:
    """What engines compute in: `auto` is bfloat16 on a GPU and float32 on a CPU."""
    return ("bfloat16" if on_gpu else "float32") if dtype == "auto" else dtype


class BenchmarkConfig(StrictModel):
    """One multiple-choice benchmark."""

    name: Literal["ceval", "cmmlu"]
    """Which prompt, categories and averages apply."""
    path: str = "builtin"
    """`builtin` (the project's own small set in the C-Eval format), `hub` (fetched once, then cached) or a folder of CSV
    files."""
    split: str | None = None
    """Folder of the labelled questions; the benchmark's own default is `val` (C-Eval) or `test` (CMMLU)."""
    content_sha256: str = Field(default="official", pattern=r"^(official|any|[0-9a-f]{64})$")
    """Hash the questions must have: `official` is the authors' publication, `any` asks nothing."""
    max_questions: int | None = Field(default=None, ge=1)
    """Ask only the first so many of each subject; the score then carries another protocol id."""


class HeldOutConfig(StrictModel):
    """Text on which bits per byte are measured."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name in files and tables."""
    source: SourceConfig
    """Where the documents lie; give `max_documents` for a large source."""
    max_chars: int | None = Field(default=None, ge=1)
    """Score only the first so many characters of each document; whole documents when left out."""


class EvaluationConfig(StrictModel):
    """Scoring of the base and the trained model."""

    benchmarks: list[BenchmarkConfig] = Field(default_factory=lambda: [BenchmarkConfig(name="ceval")], min_length=1)
    """Benchmarks, each scored by every protocol."""
    style: Literal["official", "lm_eval"] = "official"
    """`official` prompts are the authors' own; `lm_eval` is lm-evaluation-harness's template, for comparable scores."""
    num_few_shot: int = Field(default=0, ge=0, le=5)
    """Solved examples from `dev` before each question."""
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
    num_threads_per_actor: int | None = Field(default=None, ge=1)
    """Threads of an engine on a CPU; left out, the node's cores shared among the engines, and one each beside training."""
    num_gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs each engine uses; above 1 it splits the model over them (tensor parallel)."""
    labels: NodeLabels = {}
    """Nodes that engines may be on, by Ray's labels, so that scoring may use other GPUs than training:
    `{ray.io/accelerator-type: L4}`. All must hold."""
    repeats: int = Field(default=1, ge=1, le=20)
    """Ask everything so often, each time in another order; the standard deviation is reported."""
    evaluate_base: bool = True
    """Score the untouched base too: it is arm zero of every verdict."""
    held_out: list[HeldOutConfig] = Field(default_factory=list)
    """Texts on which bits per byte are measured, for base and trained model; a build looks for them in the corpus."""
    score_every_steps: int | None = Field(default=None, ge=1)
    """Score checkpoints at multiples of so many steps beside training; none when left out."""
    guardrail_points: float | None = Field(default=None, gt=0)
    """Stop training when such a score lies so many points below the base, and significantly below it."""
    continuation_prompts: list[str] | None = None
    """Prompts that base and trained model continue, shown side by side in the report (the paper's Tables 11 and 12); left
    out, the first words of the held-out texts, or one sentence of ours where there is none. `[]` continues none."""
    continuation_tokens: int = Field(default=64, ge=1)
    """Longest continuation, in tokens."""

    @property
    def computed_dtype(self) -> str:
        """What engines compute in: `dtype`, with `auto` settled by where they run."""
        return settle_dtype(self.dtype, on_gpu=self.num_gpus_per_actor > 0)

    def read_dtype(self, recorded: str) -> str:
        """What a stored score was computed in.

        Earlier versions recorded `auto` as such, and nothing of the device: on a CPU that asks for `auto` too it is read
        as float32, elsewhere it stays `auto`, which no engine computes in.
        """
        is_of_a_cpu = recorded == self.dtype == "auto" and self.num_gpus_per_actor <= 0
        return "float32" if is_of_a_cpu else recorded

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluationConfig:
        for field, items in (("benchmarks", self.benchmarks), ("held_out", self.held_out)):
            counts = Counter(str(item.name) for item in items)
            twice = [name for name, count in counts.items() if count > 1]
            if twice:
                raise ValueError(f"{field}: {twice[0]} is named twice; its scores would overwrite each other")
        return self

    @model_validator(mode="after")
    def _guardrail_has_scores(self) -> EvaluationConfig:
        if self.guardrail_points is not None and (self.score_every_steps is None or not self.evaluate_base):
            raise ValueError(
                f"guardrail_points={self.guardrail_points}: needs score_every_steps and evaluate_base=true"
            )
        return self

    @model_validator(mode="after")
    def _style_fits_protocols(self) -> EvaluationConfig:
        if self.style == "lm_eval" and self.protocols != ["logit"]:
            raise ValueError(
                f"protocols={self.protocols}: style 'lm_eval' is scored by ['logit'] only, as the harness does"
            )
        return self
