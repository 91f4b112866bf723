"""Fine-tuning on prompts whose next token is a label: measure -> start layers -> plan -> store -> train -> scores.

The stages are those of the chain where they are the same: base model, self-test, plan, training, export. What differs is
where rows come from, the layer each trains from, and what is scored.
"""

from __future__ import annotations

from layerplan.config.finetune import FinetuneConfig
from layerplan.config.run import RunConfig
from layerplan.errors import ConfigError
from layerplan.run_folder import BASE, name_step


def finetune(config: RunConfig) -> None:
    """Runs every stage that is not done yet.

    Raises:
        ConfigError: When the config has no `finetune` section, or a field that the section decides.
    """
    from layerplan.pipeline.file_checks import check_base_files

    check_base_files(config)
    from layerplan.models.adapters import check_peft
    from layerplan.pipeline.base_model import prepare_model
    from layerplan.pipeline.checks import check_model
    from layerplan.pipeline.label_scoring import judge_labels, print_label_summary, record_cost, score_model
    from layerplan.pipeline.label_stages import (
        build_label_store,
        encode_prompts,
        find_start_layers,
        settle_config,
        train_labels,
    )
    from layerplan.pipeline.publish import publish_report
    from layerplan.pipeline.session import open_run
    from layerplan.pipeline.stages import ask_loss, decide_plan

    section = require_finetune(config)
    if section.uses_lora:
        check_peft()
    check_model(config)
    with open_run(config) as context:
        model = prepare_model(context)
        task = encode_prompts(context, model, section)
        context = settle_config(context, section, task)
        recipe = ask_loss(context, model)
        plan = decide_plan(context, model, None)
        starts = find_start_layers(context, model, section, task, plan)
        store = build_label_store(context, model, task, starts, section.order)
        base = score_model(context, model, task, BASE)
        result = train_labels(context, model, section, plan, store, recipe)
        if result.stopped_early or result.hf_dir is None:
            raise SystemExit(143)
        trained = score_model(context, model.at(result.hf_dir), task, name_step(result.final_step))
        verdicts = judge_labels(context, task, base, trained)
        cost = record_cost(context, model, section, plan, starts, result)
        publish_report(context)
        print_label_summary(context, section, base, trained, verdicts, cost)


def require_finetune(config: RunConfig) -> FinetuneConfig:
    """The config's section; raises `ConfigError` when it is missing, or when fields contradict it."""
    section = config.finetune
    if section is None:
        raise ConfigError("finetune: is required by this command; give finetune.task and finetune.method")
    faults = []
    if config.plan != type(config).model_fields["plan"].get_default(call_default_factory=True):
        faults.append(
            f"plan.type={config.plan.type}: finetune.method={section.method} decides the plan; leave plan out"
        )
    if config.train.z_loss:
        faults.append(f"train.z_loss={config.train.z_loss}: belongs to the loss of all tokens; leave it at 0")
    if config.corpus.store is not None or config.corpus.upload_to is not None:
        faults.append("corpus: finetune.task gives the rows; leave corpus.store and corpus.upload_to out")
    if not config.corpus.document_mask:
        faults.append("corpus.document_mask=false: every prompt has a row of its own; leave it out")
    for name in ("held_out", "score_every_steps", "guardrail_points"):
        if getattr(config.evaluation, name):
            faults.append(
                f"evaluation.{name}: base and result are scored on the task's test prompts alone; leave it out"
            )
    if faults:
        raise ConfigError(*faults)
    return section
