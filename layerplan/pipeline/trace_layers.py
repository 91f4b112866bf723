"""Measures the layers of a model, makes the freeze plan, and shows both in `report.html`; trains nothing."""

from __future__ import annotations

from layerplan.config.run import RunConfig


def trace_layers(config: RunConfig) -> None:
    """Runs the stages up to the plan."""
    from layerplan.pipeline.file_checks import check_base_files, check_probes

    for check in (check_base_files, check_probes):
        check(config)
    from layerplan.pipeline.base_model import prepare_model
    from layerplan.pipeline.checks import check_model, check_plan
    from layerplan.pipeline.demands import ask_for_tracing
    from layerplan.pipeline.measure_layers import find_measurements
    from layerplan.pipeline.publish import publish_report
    from layerplan.pipeline.session import open_run
    from layerplan.pipeline.stages import decide_plan, trace

    for check in (check_model, check_plan):
        check(config)
    with open_run(config, ask_for_tracing) as context:
        model = prepare_model(context)
        plan = decide_plan(context, model, trace(context, model), find_measurements(context, model))
        publish_report(context)
        print(f"\nplan      {context.folder.plan} ({plan.sha256[:12]})")
        print(f"report    {context.folder.report}")
