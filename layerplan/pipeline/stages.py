"""The stages of the chain, each a function that reads files, writes its own artifact, and is skipped when it is there.

A stage never calls the next one: `chain.py` and its siblings put them in order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from eval.artifacts import Results
from eval.during_training import CheckpointScoring, backfill, read_breach
from eval.held_out import load_held_out
from eval.runner import evaluate_model
from layerplan.artifacts import write_json, write_text
from layerplan.config.corpus import CorpusConfig
from layerplan.config.evaluation import EvaluationConfig
from layerplan.config.run import RunConfig
from layerplan.corpus.build import build_token_store, warn_of_held_out
from layerplan.corpus.joining import Joining, check_joining, describe_unknown, read_joining
from layerplan.corpus.manifest import Manifest, resolve_store
from layerplan.corpus.on_the_fly import write_stream
from layerplan.errors import CorpusError, EvaluationError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.failure import note_failure
from layerplan.pipeline.lineage import note_corpus, note_results
from layerplan.pipeline.model_options import read_origins
from layerplan.pipeline.texts import hash_texts, list_benchmark_texts
from layerplan.plan.boundary_choice import choose_boundary, find_options
from layerplan.plan.decide import PlanContext, check_planned_steps, resolve_plan, wants_profile
from layerplan.plan.describe import describe_certainty, describe_measurement
from layerplan.plan.explain import (
    describe_flops,
    describe_older_rule,
    explain_plan,
    list_module_layers,
    read_choice,
    render_layer_map,
)
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_measurement import LayerMeasurements
from layerplan.plan.layer_profile import LayerProfile
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.policies import predict_beside_full
from layerplan.run_folder import (
    CONTINUATIONS_NAME,
    HELD_OUT_NAME,
    TRAIN,
    RunFolder,
    name_step,
    parse_step,
)
from layerplan.storage.flag import Flag
from layerplan.storage.mirror import fetch_file, fetch_folder
from layerplan.storage.working import find_home
from layerplan.tracer.pool import load_profile, trace_model
from layerplan.tracking.callback import LineageCallback
from layerplan.tracking.tracker import RunSinkFactory, Tracker, status_of
from layerplan.train.asking import ask_in_task, read_recipe
from layerplan.train.request import CheckpointValidation, TrainRequest, TrainResult, load_result
from layerplan.train.trainer import run_training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """What every stage needs: the config, the folder, and the parent run of the lineage."""

    config: RunConfig
    folder: RunFolder
    tracker: Tracker


def say(stage: str, text: str) -> None:
    """Says how far the run is."""
    logger.info("%s", text, extra={"stage": stage})


@contextmanager
def tracked(context: RunContext, stage: str) -> Iterator[Tracker]:
    """Opens the stage's nested run and closes it as finished or failed."""
    tracker = context.tracker.child(stage)
    try:
        yield tracker
    except BaseException as error:
        if isinstance(error, Exception):
            note_failure(context.folder, error, stage)
        tracker.close(status=status_of(error))
        raise
    context.folder.carry()
    tracker.close(status="FINISHED")
    context.folder.carry()  # the journals, which say so


def build_store(context: RunContext, model: ModelRef) -> Path | str:
    """Builds the token store, or checks the given one against the config and the model's tokenizer."""
    corpus = context.config.corpus
    tokenizer = model.tokenizer_file()
    if corpus.store is not None:
        store = resolve_store(corpus.store)
        manifest = Manifest.load(store)
        _check_store(manifest, store, corpus.seq_len, read_joining(corpus, tokenizer))
        warn_of_held_out(manifest, store, hash_texts(context.config), lambda line: say("corpus", line))
        note_corpus(context.tracker, manifest, store)
        say("corpus", f"using {store}")
        return store
    with tracked(context, "corpus") as tracker:
        build = write_stream if corpus.mode == "on_the_fly" else build_token_store
        manifest = build(
            send_store(corpus, context.folder.token_store),
            tokenizer,
            context.folder.token_store,
            questions=list_benchmark_texts(context.config),
            seed=context.config.seed,
            report=lambda line: say("corpus", line),
        )
        tracker.log_params({"num_rows": manifest.num_rows, "seq_len": manifest.seq_len})
        joining = {"end_of_text": manifest.end_of_text or manifest.end_of_text_id, "begin_ids": manifest.begin_ids}
        tracker.log_params(joining | {"control_tokens": manifest.control_tokens})
        tracker.log_metrics({f"corpus/{name}": float(count) for name, count in manifest.counts.items()}, step=0)
        tracker.log_artifact(context.folder.manifest)
    store = corpus.upload_to or name_store(context.folder.token_store)
    note_corpus(context.tracker, manifest, store)
    return store


def send_store(corpus: CorpusConfig, store: Path) -> CorpusConfig:
    """The config with which a store of a run in a bucket grows there, unless it is sent elsewhere or has no rows."""
    if corpus.upload_to is not None or corpus.mode == "on_the_fly" or find_home(store) == store:
        return corpus
    return corpus.model_copy(update={"upload_to": str(find_home(store))})


def name_store(store: Path) -> Path | str:
    """Where workers on any node read a store of the run."""
    home = find_home(store)
    return home if isinstance(home, Path) else str(home)


def ask_loss(context: RunContext, model: ModelRef) -> LossRecipe | None:
    """Asks the model how its loss over documents is computed; None when the training workers have to ask."""
    path = context.folder.self_test
    if path.exists():
        return read_recipe(json.loads(path.read_text(encoding="utf-8")))
    with tracked(context, "self_test") as tracker:
        report = ask_in_task(model, seq_len=context.config.corpus.seq_len)
        if report is None:
            say("self-test", "the model does not fit into this node's memory; the training workers ask it")
            return None
        recipe = read_recipe(report)
        write_json(path, report)
        tracker.log_params({"loss_recipe": recipe.text})
        tracker.log_artifact(path)
    say("self-test", report["sentence"])
    return recipe


def trace(context: RunContext, model: ModelRef) -> LayerProfile | None:
    """Measures the layers when the plan needs it; returns the profile, or None when nothing was measured."""
    if context.folder.profile.exists():
        say("trace", f"found {context.folder.profile}")
        return load_profile(context.folder.profile, context.config.trace)
    if not wants_profile(context.config.plan):
        say("trace", f"skipped: plan type {context.config.plan.type!r} needs no measurement")
        return None
    say("trace", f"measuring the layers of {model}")
    with tracked(context, "trace") as tracker:
        profile = trace_model(
            model, context.config.trace, out_dir=context.folder.root, report=lambda line: say("trace", line)
        )
        _log_profile(tracker, profile, context.folder)
    options = find_options(context.config.plan).model_copy(update={"without_evidence": "midpoint"})
    for line in (*describe_measurement(profile), *describe_certainty(profile, choose_boundary(profile, options))):
        say("trace", line)
    return profile


def decide_plan(
    context: RunContext,
    model: ModelRef,
    profile: LayerProfile | None,
    measurements: LayerMeasurements | None = None,
) -> FreezePlan:
    """Makes the freeze plan, or reads the one that was made before."""
    config = context.config
    identity, shape, seq_len = model.identity(), model.shape(), config.corpus.seq_len
    if context.folder.plan.exists():
        plan = FreezePlan.load(context.folder.plan)
        if plan.planned_steps is not None:
            check_planned_steps(plan, config.train.max_steps, context.folder.plan)
    else:
        origins = read_origins(model)
        known = PlanContext(identity, shape, config.train, seq_len, profile, origins, measurements)
        plan = resolve_plan(config.plan, known)
    plan.check_model(identity)
    cost_here = predict_beside_full(plan, shape, seq_len)
    write_json(context.folder.predicted_cost, cost_here.model_dump(mode="json"))
    if not context.folder.plan.exists():
        with tracked(context, "plan") as tracker:
            write_text(context.folder.plan_text, explain_plan(plan, profile, cost_here))
            plan.save(context.folder.plan)
            tracker.log_params({"plan_type": plan.plan_type, "trainable_layers": list(plan.trainable_layers)})
            if plan.trainable_modules:
                tracker.log_params({"trainable_modules": list_module_layers(plan)})
            if choice := read_choice(plan):
                tracker.log_params({"boundary_p": choice.p_value, "boundary_decided_by": choice.decided_by})
            for path in (context.folder.plan, context.folder.plan_text, context.folder.predicted_cost):
                tracker.log_artifact(path)
    note_results(context.tracker, context.folder.root)
    say("plan", plan.reason)
    if older := describe_older_rule(plan):
        say("plan", older)
    say("plan", render_layer_map(plan))
    if plan.predicted_cost is not None and plan.predicted_cost.seq_len != seq_len:
        say("plan", f"made for other rows: {describe_flops(plan.predicted_cost)}")
    say("plan", describe_flops(cost_here))
    return plan


def train(
    context: RunContext, model: ModelRef, plan: FreezePlan, store: Path | str, recipe: LossRecipe | None
) -> TrainResult:
    """Trains exactly the plan; a finished training is read back, an interrupted one continues."""
    config = context.config
    with tracked(context, TRAIN) as tracker:
        tracker.log_params(config.train.model_dump(mode="json"))
        sinks = RunSinkFactory(context.folder.metrics, TRAIN, tracker)
        result = run_training(
            replace(
                make_train_request(context, model, plan, store, sinks),
                recipe=recipe,
                validation=_make_validation(describe_scoring(context, model, plan)),
            ),
            callbacks=[LineageCallback(tracker)],
        )
        fetch_folder(context.folder.evaluation)
        for path in (context.folder.metrics, context.folder.guardrail):
            fetch_file(path)  # written by a worker, perhaps of another node
        _log_result(tracker, result, context.folder)
    note_results(context.tracker, context.folder.root)
    say("train", f"loss {result.first_loss:.3f} -> {result.final_loss:.3f}, {result.tokens_seen:,} tokens")
    return result


def make_train_request(
    context: RunContext, model: ModelRef, plan: FreezePlan, store: Path | str, sink_factory: RunSinkFactory | None
) -> TrainRequest:
    """The request of the run itself; sweeps vary it."""
    config = context.config
    return TrainRequest(
        run_dir=context.folder.root,
        model=model,
        plan=plan,
        store=store,
        config=config.train,
        seed=config.seed,
        sink_factory=sink_factory,
        records=(context.folder.metrics,),
        document_mask=config.corpus.document_mask,
    )


def describe_scoring(context: RunContext, model: ModelRef, plan: FreezePlan) -> CheckpointScoring:
    """What scoring a checkpoint of this run needs."""
    config = context.config
    return CheckpointScoring(
        run_dir=context.folder.root,
        base=model,
        plan=plan,
        config=config.evaluation,
        final_step=config.train.max_steps,
        stop_file=Flag(context.folder.stop_request),
        export_dtype=config.train.export_dtype,
    )


def score_checkpoints(context: RunContext, scoring: CheckpointScoring, steps: Iterable[int]) -> dict[int, Results]:
    """Back-fill: scores the checkpoints of these steps that are still there, and puts all scores into the lineage."""
    scored, gone = backfill(scoring, steps)
    for step, results in scored.items():
        label = name_step(step)
        with tracked(context, f"evaluate_{label}") as tracker:
            _log_scores(tracker, context.folder.evaluation / label, results, step, context.config.evaluation)
    if gone:
        say("evaluate", f"not scored, their checkpoints are gone: step {', '.join(map(str, gone))}")
    return scored


def check_guardrail(context: RunContext) -> None:
    """Raises `EvaluationError` with the verdict when a checkpoint's score stopped this run before its end."""
    points = context.config.evaluation.guardrail_points
    finished = load_result(context.folder.root)
    if points is None or (finished is not None and finished.final_step >= context.config.train.max_steps):
        return
    breach = read_breach(context.folder.root, points)
    if breach is not None:
        path = context.folder.guardrail
        places = " and ".join(dict.fromkeys((str(find_home(path)), str(path))))
        raise EvaluationError(
            f"evaluation.guardrail_points={points:g}: training was stopped by the score of {breach} Raise the value or"
            f" remove {places} to go on"
        )


def evaluate(context: RunContext, model: ModelRef, label: str) -> Results:
    """Scores one model into `evaluation/<label>`."""
    folder = context.folder.evaluation / label
    with tracked(context, f"evaluate_{label}") as tracker:
        results = evaluate_model(
            model,
            context.config.evaluation,
            folder,
            report=lambda line: say("evaluate", f"{label}: {line}"),
        )
        _log_scores(tracker, folder, results, parse_step(label) or 0, context.config.evaluation)
    return results


def _make_validation(scoring: CheckpointScoring) -> CheckpointValidation | None:
    """Scoring as Ray Train's validation, when any step is due."""
    due = scoring.due_steps
    return CheckpointValidation(scoring, due) if due else None


def _log_scores(tracker: Tracker, folder: Path, results: Results, step: int, config: EvaluationConfig) -> None:
    """Puts accuracies, bits per byte and the files behind them into the lineage."""
    for key, result in results.items():
        tracker.log_metrics({f"eval/{key}/accuracy": result.question_mean}, step=step)
    for text in load_held_out(folder, [item.name for item in config.held_out]).values():
        tracker.log_metrics({f"eval/{text.name}/bits_per_byte": text.bits_per_byte}, step=step)
    for path in sorted(
        [*folder.glob("*.json"), *folder.glob(f"{HELD_OUT_NAME}/*.json"), *folder.glob(CONTINUATIONS_NAME)]
    ):
        tracker.log_artifact(path)


def _check_store(manifest: Manifest, store: Path | str, seq_len: int, joining: Joining) -> None:
    if manifest.seq_len != seq_len:
        raise CorpusError(f"corpus.store={store}: has rows of {manifest.seq_len} tokens, corpus.seq_len={seq_len}")
    if manifest.tokenizer_sha256 != joining.facts.sha256:
        raise CorpusError(f"corpus.store={store}: was built with another tokenizer than the model's; build it again")
    check_joining(manifest, joining, f"corpus.store={store}")
    unknown = describe_unknown(manifest, store)
    if unknown is not None:
        say("corpus", unknown)


def _log_result(tracker: Tracker, result: TrainResult, folder: RunFolder) -> None:
    tracker.set_tags({f"proof.{name}": str(value) for name, value in result.proof.items()})
    for path in (folder.training, folder.export):
        if path.exists():
            tracker.log_artifact(path)


def _log_profile(tracker: Tracker, profile: LayerProfile, folder: RunFolder) -> None:
    """Puts the profile and its per-layer curves into the lineage, the layer index as the step."""
    tracker.log_params({"num_probes": profile.num_probes, "best_boundary": profile.best_boundary})
    for layer, value in enumerate(profile.task_particle):
        tracker.log_metrics({"trace/task_particle": value}, step=layer)
    for layer, value in enumerate(profile.layer_sensitivity):
        tracker.log_metrics({"trace/layer_sensitivity": value}, step=layer)
    for index, value in enumerate(profile.alignment_score):
        tracker.log_metrics({"trace/alignment_score": value}, step=index + 1)
    for path in (folder.profile, folder.probes):
        tracker.log_artifact(path)
