"""`RunConfig`: everything one run needs, resolved once, written beside the run and accepted again by `--config`."""

from __future__ import annotations

from pydantic import Field, model_validator

from layerplan.config.base import NAME_PATTERN, StrictModel
from layerplan.config.cluster import ClusterConfig
from layerplan.config.corpus import CorpusConfig
from layerplan.config.evaluation import EvaluationConfig
from layerplan.config.finetune import FinetuneConfig
from layerplan.config.measure import MeasureConfig
from layerplan.config.model import ModelConfig, ScratchModelConfig
from layerplan.config.plan import FromProfilePlanConfig, PlanConfig
from layerplan.config.sweep import SweepConfig
from layerplan.config.trace import TraceConfig
from layerplan.config.tracking import TrackingConfig
from layerplan.config.train import TrainConfig


class RunConfig(StrictModel):
    """One run of the chain: config -> trace -> plan -> corpus -> train -> checkpoint -> evaluate -> verdict."""

    name: str = Field(min_length=1, max_length=100, pattern=NAME_PATTERN)
    """Name of the run and of its folder; the same name continues the run."""
    storage_path: str = "runs"
    """Folder that holds the runs, or `s3://bucket/folder` or `gs://bucket/folder`; relative paths start where the job does."""
    working_path: str | None = None
    """Local folder for the files that a run stored at an address is working on; left out, one in the temporary folder."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the corpus order and of random weights."""
    model: ModelConfig
    """The model to continue."""
    trace: TraceConfig = TraceConfig()
    """Layer measurement."""
    measure: MeasureConfig = MeasureConfig()
    """Rival measurements of the layers."""
    plan: PlanConfig = Field(default_factory=FromProfilePlanConfig)
    """What freezes."""
    corpus: CorpusConfig = CorpusConfig()
    """Training text."""
    train: TrainConfig = TrainConfig()
    """Training."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Scoring."""
    tracking: TrackingConfig = TrackingConfig()
    """Lineage."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray."""
    sweep: SweepConfig | None = None
    """Plans to try; read by `sweep` only."""
    finetune: FinetuneConfig | None = None
    """Task and method of a fine-tuning; read by `finetune` only, which takes plan, rows and steps from it."""

    @model_validator(mode="after")
    def _sequence_fits_model(self) -> RunConfig:
        if isinstance(self.model, ScratchModelConfig) and self.corpus.seq_len > self.model.max_position_embeddings:
            raise ValueError(
                f"corpus.seq_len={self.corpus.seq_len} must be at most"
                f" model.max_position_embeddings={self.model.max_position_embeddings}"
            )
        return self

    @model_validator(mode="after")
    def _scored_steps_have_checkpoints(self) -> RunConfig:
        every, saved = self.evaluation.score_every_steps, self.train.checkpoint_every_steps
        if every is not None and every % saved:
            raise ValueError(
                f"evaluation.score_every_steps={every} must be a multiple of train.checkpoint_every_steps={saved}"
            )
        return self
