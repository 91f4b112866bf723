"""Which model is continued: an existing one, one put together from several, or a small one made from scratch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from layerplan.config.base import StrictModel
from layerplan.config.corpus import SourceConfig
from layerplan.config.stitch import StitchedModelConfig


class PretrainedModelConfig(StrictModel):
    """An existing causal language model: a Hugging Face folder, a GGUF file or a hub id."""

    type: Literal["pretrained"] = "pretrained"
    name: str = Field(min_length=1)
    """Folder with `config.json`, tokenizer and safetensors weights; or a hub id such as `Qwen/Qwen3-0.6B`; or a `.gguf`
    file, by its path or as `package://<import name>/<file>` inside an installed Python package, which is converted once
    into `<storage_path>/gguf_models/`."""
    revision: str = "main"
    """Branch, tag or commit of a hub id; ignored for folders. A run keeps the commit at which the branch stood when it
    began."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, and with the run's own exports of it. Off unless asked."""


class ScratchModelConfig(StrictModel):
    """A small Qwen3-shaped base that the job makes itself: its own BPE tokenizer, random weights, a brief `full` training.

    It exists so that a first run needs no download and still traces and freezes a model that has learned something.
    """

    type: Literal["scratch"] = "scratch"
    vocab_size: int = Field(default=8192, ge=300, le=262_144)
    """Size of the byte-level BPE vocabulary trained on the corpus."""
    num_layers: int = Field(default=8, ge=2, le=128)
    """Decoder layers."""
    hidden_size: int = Field(default=256, ge=16)
    """Width of the residual stream."""
    intermediate_size: int = Field(default=768, ge=16)
    """Width of the gated feed-forward layer."""
    num_attention_heads: int = Field(default=4, ge=1)
    """Query heads."""
    num_key_value_heads: int = Field(default=2, ge=1)
    """Key and value heads; divides `num_attention_heads`."""
    head_dim: int = Field(default=64, ge=8)
    """Width of one head."""
    max_position_embeddings: int = Field(default=2048, ge=64)
    """Longest sequence the model accepts, in tokens."""
    tie_word_embeddings: bool = True
    """Input embedding and output head share one matrix, as in small Qwen3 models."""
    initializer_range: float = Field(default=0.02, gt=0, le=1)
    """Standard deviation of the random weights; a narrow model learns faster with more than the usual 0.02."""
    pretrain_sources: list[SourceConfig] | None = None
    """Text of that training; left out, the run's own `corpus.sources`."""
    pretrain_steps: int = Field(default=60, ge=1)
    """Optimizer steps of the brief `full` training that turns the random model into a base."""
    pretrain_learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of that training."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}"
            )
        return self


ModelConfig = Annotated[PretrainedModelConfig | ScratchModelConfig | StitchedModelConfig, Field(discriminator="type")]
