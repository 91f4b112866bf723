"""The whole chain: config -> trace -> plan -> corpus -> train -> checkpoint -> evaluate -> verdict.

A stage whose artifact is complete in the run folder is not repeated: submit the same run name again to continue. A bad
config is refused and a dry run answers before the engines are imported, which takes seconds.
"""

from __future__ import annotations

from layerplan.config.run import RunConfig
from layerplan.run_folder import BASE, name_step


def continue_pretraining(config: RunConfig) -> None:
    """Runs every stage that is not done yet."""
    from layerplan.pipeline.file_checks import check_files

    check_files(config)
    from layerplan.pipeline.base_model import prepare_model
    from layerplan.pipeline.checks import check_model, check_plan, check_plan_of_made, check_rows, check_store
    from layerplan.pipeline.demands import ask_around_training, ask_for_training
    from layerplan.pipeline.judging import judge
    from layerplan.pipeline.measure_layers import find_measurements
    from layerplan.pipeline.publish import publish_card, publish_report
    from layerplan.pipeline.session import open_run
    from layerplan.pipeline.stages import (
        ask_loss,
        build_store,
        check_guardrail,
        decide_plan,
        describe_scoring,
        evaluate,
        score_checkpoints,
        trace,
        train,
    )
    from layerplan.pipeline.summary import print_summary

    for check in (check_model, check_rows, check_plan):
        check(config)
    with open_run(config, ask_for_training, ask_around_training) as context:
        model = prepare_model(context)
        check_plan_of_made(config, model)
        recipe = ask_loss(context, model)
        store = build_store(context, model)
        check_store(config, store)
        profile = trace(context, model)
        plan = decide_plan(context, model, profile, find_measurements(context, model))
        check_guardrail(context)
        scoring = describe_scoring(context, model, plan)
        judges = config.evaluation.evaluate_base
        base = evaluate(context, model, BASE) if judges and scoring.due_steps else None
        result = train(context, model, plan, store, recipe)
        check_guardrail(context)
        if result.stopped_early or result.hf_dir is None:
            raise SystemExit(143)
        score_checkpoints(context, scoring, scoring.due_steps)
        label = name_step(result.final_step)
        verdicts = []
        scores = evaluate(context, model.at(result.hf_dir), label)
        if judges:
            base = base or evaluate(context, model, BASE)
            verdicts = judge(context, base, scores, label, store)
        answers = publish_report(context)
        publish_card(context, answers, verdicts, result.hf_dir)
        print_summary(plan, result, verdicts, answers, context.folder.report)
