"""What can be known to be wrong with a sweep before anything is started."""

from __future__ import annotations

from layerplan.config.model import ScratchModelConfig
from layerplan.config.run import RunConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.config.sweep import VALIDATION_LOSS, SweepConfig
from layerplan.corpus.manifest import Manifest, resolve_store
from layerplan.errors import ConfigError
from layerplan.pipeline.candidates import list_boundaries
from layerplan.pipeline.donors import check_donors
from layerplan.pipeline.model_options import find_base

RESERVED = (
    VALIDATION_LOSS,
    "train_loss",
    "step",
    "loss",
    "percent",
    "done",
    "error",
    "tokens_per_s",
    "train_s",
    "wall_s",
)
"""Of a trial's reports, beside the names of texts."""


def check_sweep(config: RunConfig, sweep: SweepConfig) -> None:
    """Looks at the space and at what is to be low.

    Raises:
        ConfigError: Naming a boundary that the model does not have, a metric that no trial would report, or a range of
            workers.
    """
    if not isinstance(config.train.num_workers, int):
        raise ConfigError("train.num_workers: a range of workers is for single runs; a sweep's trials share one number")
    list_boundaries(sweep, _count_layers(config))
    check_metric(config, sweep)


def list_unused_scoring(config: RunConfig) -> list[str]:
    """What a config that is a run's too asks of questions beside training: trials are judged by losses on rows alone."""
    return [
        f"evaluation.{name} is not looked at: a sweep's trials are judged by losses on rows, no benchmark is asked"
        for name in ("score_every_steps", "guardrail_points")
        if getattr(config.evaluation, name) is not None
    ]


def check_metric(config: RunConfig, sweep: SweepConfig) -> None:
    """Raises `ConfigError` when no trial would report what is to be low."""
    texts = [item.name for item in config.evaluation.held_out]
    taken = next((name for name in texts if name in RESERVED), None)
    if taken is not None:
        raise ConfigError(
            f"evaluation.held_out: {taken!r} is a name that a sweep's trials use themselves; choose another"
        )
    if sweep.metric != VALIDATION_LOSS and sweep.metric not in texts:
        allowed = ", ".join([VALIDATION_LOSS, *texts])
        raise ConfigError(
            f"sweep.metric={sweep.metric!r}: no trial reports it; allowed: {allowed} (names of evaluation.held_out)"
        )
    if sweep.metric == VALIDATION_LOSS and not _has_validation_rows(config):
        raise ConfigError(
            f"sweep.metric={VALIDATION_LOSS}: no trial reports it, as no rows of the corpus are held out; set"
            " corpus.validation_rows, or name one of evaluation.held_out"
        )


def _has_validation_rows(config: RunConfig) -> bool:
    if config.corpus.store is None:
        return config.corpus.validation_rows > 0
    return Manifest.load(resolve_store(config.corpus.store)).held_out is not None


def _count_layers(config: RunConfig) -> int:
    if isinstance(config.model, ScratchModelConfig):
        return config.model.num_layers
    if isinstance(config.model, StitchedModelConfig):
        return check_donors(config, config.model)[1].num_layers
    return find_base(config).shape().num_layers
