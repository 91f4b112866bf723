"""The stages of a fine-tuning up to its training: prompts, measurement, start layers, rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eval.label_encoding import EncodedPrompt, EncodedTask, encode_task
from eval.label_tasks import load_task
from layerplan.artifacts import hash_file
from layerplan.config.finetune import FinetuneConfig, RowOrder
from layerplan.corpus.label_order import LabelOrder
from layerplan.corpus.label_store import write_label_store
from layerplan.corpus.manifest import LabelFacts, Manifest
from layerplan.errors import ConfigError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.lineage import note_corpus, note_results
from layerplan.pipeline.stages import RunContext, make_train_request, name_store, say, tracked
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.row_starts import choose_plan_config, choose_start_layers, find_eof_layer
from layerplan.run_folder import BASE, TRAIN
from layerplan.storage.mirror import fetch_file
from layerplan.tracer.samples import Sample, measure_samples
from layerplan.tracking.callback import LineageCallback
from layerplan.tracking.tracker import RunSinkFactory
from layerplan.train.request import LabelOptions, TrainResult
from layerplan.train.trainer import Fit, run_training

MAX_VALIDATION_ROWS = 256
"""Test prompts whose loss is measured while training; all of them are scored at its end."""


def encode_prompts(context: RunContext, model: ModelRef, section: FinetuneConfig) -> EncodedTask:
    """Reads the task and turns it into ids by the model's own tokenizer."""
    task = load_task(section.task)
    options = {"max_tokens": section.task.max_tokens, "max_positions": model.max_positions()}
    encoded = encode_task(task, model.tokenizer(), **options)
    sizes = f"{len(encoded.train):,} prompts to train on, {len(encoded.test):,} to test on"
    left_out = sum(encoded.num_too_long.values())
    labels = ", ".join(repr(word) for word in encoded.spelled.values())
    say("task", f"{encoded.name}: {sizes}, labels {labels}" + (f"; {left_out:,} left out as too long" * (left_out > 0)))
    if line := describe_unasked(encoded):
        say("task", line)
    return encoded


def describe_unasked(task: EncodedTask) -> str:
    """What classes without a prompt in the test do to its macro F1, in one line; nothing when there are none."""
    asked = {prompt.label_id for prompt in task.test}
    unasked = [label for label, token in task.label_ids.items() if token not in asked]
    if not unasked:
        return ""
    most = 1 - len(unasked) / len(task.label_ids)
    return f"the test has no prompt of {', '.join(map(repr, unasked))}: an F1 of 0 each, so that macro F1 is at most {most:.1%}"


def settle_config(context: RunContext, section: FinetuneConfig, task: EncodedTask) -> RunContext:
    """The run's config with the plan, the rows' length and the steps that follow from task and method.

    Raises:
        ConfigError: When `train.max_steps` was given and is not what the epochs take.
    """
    config = context.config
    order = LabelOrder((0,) * len(task.train), config.train.global_batch_size, config.seed)
    steps = section.epochs * order.steps_per_epoch
    default = type(config.train).model_fields["max_steps"].default
    if config.train.max_steps not in (default, steps):
        raise ConfigError(
            f"train.max_steps={config.train.max_steps}: {section.epochs} epochs of {len(task.train):,} prompts at"
            f" train.global_batch_size={config.train.global_batch_size} are {steps} steps; leave it out"
        )
    settled = config.model_copy(
        update={
            "plan": choose_plan_config(section),
            "corpus": config.corpus.model_copy(update={"seq_len": task.longest}),
            "train": config.train.model_copy(update={"max_steps": steps}),
        }
    )
    say("task", f"{section.epochs} epochs of {order.steps_per_epoch} steps; rows of up to {task.longest} tokens")
    return replace(context, config=settled)


def find_start_layers(
    context: RunContext, model: ModelRef, section: FinetuneConfig, task: EncodedTask, plan: FreezePlan
) -> list[int]:
    """The layer each training row trains from; `salf` measures the rows first, with the actors of the tracer."""
    eof_layers = None
    if section.method == "salf":
        with tracked(context, "measure") as tracker:
            records = measure_samples(
                model,
                make_samples(task.train),
                context.config.trace,
                path=context.folder.samples_of(BASE, "train"),
                report=lambda line: say("measure", line),
            )
            tracker.log_artifact(context.folder.samples_of(BASE, "train"))
        eof_layers = [find_eof_layer(record[f"deviation_{section.deviation}"]) for record in records]
        common = ", ".join(f"{layer} ({count:,})" for layer, count in Counter(eof_layers).most_common(4))
        say("measure", f"end-of-freezing layers by {section.deviation}, most common first: {common}")
    starts = choose_start_layers(section, plan, len(task.train), eof_layers, seed=context.config.seed)
    if eof_layers is not None:
        matched = sum(eof <= start for eof, start in zip(eof_layers, starts, strict=True))
        say("measure", f"{matched:,} of {len(starts):,} rows start at or above their own layer, the rest were drawn")
    return starts


def make_samples(prompts: Sequence[EncodedPrompt]) -> list[Sample]:
    """Encoded prompts as the tracer takes them."""
    return [Sample(prompt.id, prompt.input_ids, prompt.label_id) for prompt in prompts]


def build_label_store(
    context: RunContext, model: ModelRef, task: EncodedTask, starts: Sequence[int], order: RowOrder
) -> Path | str:
    """Writes the rows with their start layers; a finished store of the same rows is used again.

    Raises:
        ConfigError: When the run's store holds other rows.
    """
    folder = context.folder.token_store
    facts = LabelFacts(
        task=task.name, task_sha256=task.sha256, label_ids=task.label_ids, start_layers=list(starts), order=order
    )
    if context.folder.manifest.exists():
        manifest = Manifest.load(folder)
        if manifest.labels != facts:
            raise ConfigError(
                f"name: run {context.config.name!r} has a store of other prompts, start layers or order; choose another name"
            )
        say("corpus", f"found {folder}")
    else:
        tokenizer = model.tokenizer()
        counts = {"in": len(task.train) + task.num_too_long["train"], "kept": len(task.train)}
        manifest = write_label_store(
            folder,
            [(*prompt.input_ids, prompt.label_id) for prompt in task.train],
            [(*prompt.input_ids, prompt.label_id) for prompt in spread(task.test, MAX_VALIDATION_ROWS)],
            facts,
            vocab_size=len(tokenizer),
            padding_id=tokenizer.eos_token_id or 0,
            tokenizer_sha256=hash_file(model.tokenizer_file()),
            counts=counts | {"filtered/too_long": task.num_too_long["train"]},
        )
        context.folder.carry()
        say("corpus", f"{manifest.num_rows:,} rows, {manifest.num_tokens:,} tokens; {describe_starts(starts)}")
    store = name_store(folder)
    note_corpus(context.tracker, manifest, store)
    return store


def spread(prompts: Sequence[EncodedPrompt], limit: int) -> Sequence[EncodedPrompt]:
    """At most so many prompts, evenly over all of them: a test's files may be sorted by kind."""
    return prompts[:: -(-len(prompts) // limit)]


def describe_starts(starts: Sequence[int]) -> str:
    """How many rows start where, in one line."""
    counts = Counter(starts)
    if len(counts) == 1:
        return f"all train from layer {starts[0]} on"
    return f"start layers {min(counts)} to {max(counts)}, {min(counts.values())} to {max(counts.values())} rows each"


def train_labels(
    context: RunContext,
    model: ModelRef,
    section: FinetuneConfig,
    plan: FreezePlan,
    store: Path | str,
    recipe: LossRecipe | None,
    fit: Fit | None = None,
) -> TrainResult:
    """Trains, continues, or reads back a finished training; `fit` as of `run_training`."""
    with tracked(context, TRAIN) as tracker:
        tracker.log_params(context.config.train.model_dump(mode="json") | {"method": section.method})
        sinks = RunSinkFactory(context.folder.metrics, TRAIN, tracker)
        options = LabelOptions(
            section.loss, trains_alone=section.method == "lift", lora=section.lora if section.uses_lora else None
        )
        request = make_train_request(context, model, plan, store, sinks)
        request = replace(request, recipe=recipe, labels=options)
        result = run_training(request, callbacks=[LineageCallback(tracker)], fit=fit)
        fetch_file(context.folder.metrics)
        for path in (context.folder.training, context.folder.export):
            if path.exists():
                tracker.log_artifact(path)
    note_results(context.tracker, context.folder.root)
    say("train", f"loss {result.first_loss:.3f} -> {result.final_loss:.3f} over {sum(result.propagated_rows):,} rows")
    return result
