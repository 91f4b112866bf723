"""The stages of the chain, each a function that reads files, writes its own artifact, and is skipped when it is there.

A stage never calls the next one: `jobs/cpt.py` and its siblings put them in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.run_folder import RunFolder
from layerplan.config.model import ScratchModelConfig
from layerplan.config.plan import FilePlanConfig, FullPlanConfig
from layerplan.config.run import RunConfig
from layerplan.config.train import TrainConfig
from layerplan.corpus.manifest import Manifest
from layerplan.errors import ConfigError
from layerplan.models.causal_lm import identify_model, load_hf_config
from layerplan.plan.explain import explain_plan, render_layer_map
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan, needs_profile
from layerplan.tracking.tracker import Tracker
from layerplan.train.trainer import TrainRequest, TrainResult, run_training

TOKENIZER_SAMPLE_CHARS = 8_000_000
"""Text the quick-start tokenizer is trained on; more changes the merges little."""


@dataclass(frozen=True)
class RunContext:
    """What every stage needs: the config, the folder, and the parent run of the lineage."""

    config: RunConfig
    folder: RunFolder
    tracker: Tracker


def say(stage: str, text: str) -> None:
    """Prints one progress line."""
    print(f"[{stage}] {text}", flush=True)


@contextmanager
def tracked(context: RunContext, stage: str) -> Iterator[Tracker]:
    """Opens the stage's nested run and closes it as finished or failed."""
    tracker = context.tracker.child(stage)
    try:
        yield tracker
    except BaseException:
        tracker.close(status="FAILED")
        raise
    tracker.close(status="FINISHED")


def prepare_model(context: RunContext) -> str:
    """Returns the folder or hub id of the base model, making a scratch one first when the config asks for it."""
    model = context.config.model
    if not isinstance(model, ScratchModelConfig):
        return model.name
    trained = context.folder.base_model / "hf"
    if (trained / "config.json").exists():
        say("base", f"found {trained}")
        return str(trained)
    return _make_scratch_base(context, model, trained)


def build_store(context: RunContext, model_name: str) -> Path:
    """Builds the token store, or checks the given one against the config and the model's tokenizer."""
    from layerplan.corpus.build import build_token_store
    from layerplan.models.causal_lm import find_tokenizer_file

    corpus = context.config.corpus
    if corpus.store is not None:
        store = Path(corpus.store).expanduser().resolve()
        _check_store(Manifest.load(store), context.config)
        return store
    with tracked(context, "corpus") as tracker:
        manifest = build_token_store(
            corpus,
            find_tokenizer_file(model_name, revision=revision_of(context.config)),
            context.folder.token_store,
            questions=_benchmark_texts(context.config),
            seed=context.config.seed,
            report=lambda line: say("corpus", line),
        )
        tracker.log_params({"num_rows": manifest.num_rows, "seq_len": manifest.seq_len})
        tracker.log_metrics({f"corpus/{name}": float(count) for name, count in manifest.counts.items()}, step=0)
    return context.folder.token_store


def trace(context: RunContext, model_name: str) -> LayerProfile | None:
    """Measures the layers when the plan needs it; returns the profile, or None when nothing was measured."""
    from layerplan.tracer.pool import trace_model

    if context.folder.profile.exists():
        say("trace", f"found {context.folder.profile}")
        return LayerProfile.load(context.folder.profile)
    if not needs_profile(context.config.plan):
        say("trace", f"skipped: plan type {context.config.plan.type!r} needs no measurement")
        return None
    with tracked(context, "trace") as tracker:
        profile = trace_model(
            model_name,
            context.config.trace,
            revision=revision_of(context.config),
            trust_remote_code=trusts_remote_code(context.config),
            out_dir=context.folder.root,
        )
        log_profile(tracker, profile, context.folder)
    return profile


def decide_plan(context: RunContext, model_name: str, profile: LayerProfile | None) -> FreezePlan:
    """Makes the freeze plan, or reads the one that was made before."""
    config = context.config
    identity = identify_model(model_name, revision=revision_of(config))
    if context.folder.plan.exists():
        plan = FreezePlan.load(context.folder.plan)
    elif isinstance(config.plan, FilePlanConfig):
        plan = FreezePlan.load(Path(config.plan.path))
    else:
        plan = make_plan(config.plan, model=identity, shape=shape_of(model_name, config), profile=profile)
    plan.check_model(identity)
    if not context.folder.plan.exists():
        with tracked(context, "plan") as tracker:
            context.folder.plan_text.write_text(explain_plan(plan, profile), encoding="utf-8")
            plan.save(context.folder.plan)
            tracker.log_params({"plan_type": plan.plan_type, "trainable_layers": list(plan.trainable_layers)})
            tracker.log_artifact(context.folder.plan)
            tracker.log_artifact(context.folder.plan_text)
    say("plan", plan.reason)
    print(render_layer_map(plan), flush=True)
    return plan


def train(context: RunContext, model_name: str, plan: FreezePlan, store: Path) -> TrainResult:
    """Trains exactly the plan; a finished training is read back, an interrupted one continues."""
    from layerplan.tracking.callback import RunCallback

    with tracked(context, "train") as tracker:
        request = TrainRequest(
            run_dir=context.folder.root,
            model_path=model_name,
            plan=plan,
            store=store,
            config=context.config.train,
            seed=context.config.seed,
            sink_factory=tracker.make_sink_factory(context.folder.root / "metrics.jsonl"),
        )
        result = run_training(request, callbacks=[RunCallback(tracker.make_sink_factory(None))])
        tracker.log_params({"gradient_coverage": "equal to the plan", "hf_dir": str(result.hf_dir)})
    return result


def revision_of(config: RunConfig) -> str:
    """Revision of a hub model; `main` for models made here."""
    return getattr(config.model, "revision", "main")


def trusts_remote_code(config: RunConfig) -> bool:
    """Whether the user allowed the model's own Python code."""
    return bool(getattr(config.model, "trust_remote_code", False))


def shape_of(model_name: str, config: RunConfig) -> ModelShape:
    """Shape of the model from its config file alone."""
    return ModelShape.from_hf_config(load_hf_config(model_name, revision=revision_of(config)))


def log_profile(tracker: Tracker, profile: LayerProfile, folder: RunFolder) -> None:
    """Puts the profile and its per-layer curves into the lineage, the layer index as the step."""
    tracker.log_params({"num_probes": profile.num_probes, "best_boundary": profile.best_boundary})
    for layer, value in enumerate(profile.task_particle):
        tracker.log_metrics({"trace/task_particle": value}, step=layer)
    for layer, value in enumerate(profile.layer_sensitivity):
        tracker.log_metrics({"trace/layer_sensitivity": value}, step=layer)
    for index, value in enumerate(profile.alignment_score):
        tracker.log_metrics({"trace/alignment_score": value}, step=index + 1)
    tracker.log_artifact(folder.profile)
