"""What the commands hold of a cluster at once, from the config alone."""

from __future__ import annotations

from layerplan.config.measure import MeasureConfig
from layerplan.config.model import ScratchModelConfig
from layerplan.config.run import RunConfig
from layerplan.config.trace import TraceConfig
from layerplan.plan.decide import wants_profile
from layerplan.sharing.demand import Demand
from layerplan.train.ray_trainer import describe_worker

DATA_CPUS = 0.25
"""A reading task must fit beside the training workers, or training would wait for data forever."""


def ask_for_training(config: RunConfig) -> list[Demand]:
    """Training workers, the fewest of a range; what reads their rows; the engines that score beside them."""
    train = config.train
    is_whole = train.placement == "strict_pack"
    workers = Demand(
        what="training worker",
        field="train",
        count=train.fewest_workers,
        resources=describe_worker(train),
        labels=train.labels,
        together=train.fewest_workers // train.num_replicas if is_whole else 1,
    )
    reading = Demand(what="reading task", field="train", count=1, resources={"CPU": DATA_CPUS})
    return [workers, reading, *(ask_for_scoring(config) if config.evaluation.score_every_steps is not None else ())]


def ask_for_scoring(config: RunConfig) -> list[Demand]:
    """The engines."""
    evaluation = config.evaluation
    resources = _name_resources(evaluation.num_cpus_per_actor, evaluation.num_gpus_per_actor)
    return [
        Demand(
            what="engine",
            field="evaluation",
            count=evaluation.num_actors,
            resources=resources,
            labels=evaluation.labels,
        )
    ]


def ask_for_tracing(config: RunConfig) -> list[Demand]:
    """One of the tracers, since the others take what there is; or what trains the base."""
    return _ask_for_base(config) or [_ask_for_one("tracer", "trace", config.trace)]


def ask_for_measuring(config: RunConfig) -> list[Demand]:
    """One of the processes that measure, or what trains the base."""
    return _ask_for_base(config) or [_ask_for_one("measuring process", "measure", config.measure)]


def ask_for_building(config: RunConfig) -> list[Demand]:
    """One of the processes that tokenize, or what trains the base."""
    resources = {"CPU": config.corpus.num_cpus_per_worker}
    return _ask_for_base(config) or [Demand(what="tokenizing process", field="corpus", count=1, resources=resources)]


def ask_around_training(config: RunConfig) -> list[Demand]:
    """One of what a whole run places before and after its training."""
    tracer = [_ask_for_one("tracer", "trace", config.trace)] if wants_profile(config.plan) else []
    return [*tracer, *(engine.model_copy(update={"count": 1}) for engine in ask_for_scoring(config))]


def _ask_for_base(config: RunConfig) -> list[Demand]:
    """A model that the config makes is trained first."""
    return ask_for_training(config) if isinstance(config.model, ScratchModelConfig) else []


def _ask_for_one(what: str, field: str, config: TraceConfig | MeasureConfig) -> Demand:
    resources = _name_resources(config.num_cpus_per_actor, config.num_gpus_per_actor)
    return Demand(what=what, field=field, count=1, resources=resources, labels=config.labels)


def _name_resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
