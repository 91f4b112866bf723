"""The whole chain: config -> trace -> plan -> corpus -> train -> checkpoint -> evaluate -> verdict.

    python jobs/cpt.py --config jobs/configs/quickstart.yaml
    ray job submit --working-dir . -- python jobs/cpt.py --config jobs/configs/quickstart.yaml

A stage whose artifact is complete in the run folder is not repeated: submit the same run name again to continue. A bad
config is refused and a dry run answers before the engines are imported, which takes seconds.
"""

from __future__ import annotations

import argparse
import sys

from jobs.dry_run import print_dry_run
from jobs.entry import build_parser, run_job
from jobs.model_options import revision_of
from layerplan.config.run import RunConfig


def continue_pretraining(config: RunConfig, args: argparse.Namespace) -> None:
    """Runs every stage that is not done yet."""
    if args.dry_run:
        print_dry_run(config)
        return
    from jobs.base_model import prepare_model
    from jobs.checks import check_benchmarks, check_corpus, check_model, check_probes
    from jobs.session import open_run
    from jobs.stages import (
        ask_loss,
        build_store,
        check_guardrail,
        decide_plan,
        describe_scoring,
        evaluate,
        judge,
        publish_report,
        score_checkpoints,
        trace,
        train,
    )
    from jobs.summary import print_summary
    from layerplan.checkpoint.layout import name_step

    for check in (check_model, check_corpus, check_probes, check_benchmarks):
        check(config)
    with open_run(config) as context:
        model = prepare_model(context)
        recipe = ask_loss(context, model)
        store = build_store(context, model)
        profile = trace(context, model)
        plan = decide_plan(context, model, profile)
        check_guardrail(context)
        scoring = describe_scoring(context, model, plan)
        judges = config.evaluation.evaluate_base
        base = evaluate(context, model, "base", revision=revision_of(config)) if judges and scoring.due_steps else None
        result = train(context, model, plan, store, recipe)
        check_guardrail(context)
        if result.stopped_early:
            raise SystemExit(143)
        score_checkpoints(context, scoring, scoring.due_steps)
        label = name_step(result.final_step)
        verdicts = []
        scores = evaluate(context, str(result.hf_dir), label)
        if judges:
            base = base or evaluate(context, model, "base", revision=revision_of(config))
            verdicts = judge(context, base, scores, label)
        report = publish_report(context)
        print_summary(plan, result, verdicts, report)


if __name__ == "__main__":
    sys.exit(run_job(continue_pretraining, build_parser("Continue pre-training under a measured freeze plan.")))
