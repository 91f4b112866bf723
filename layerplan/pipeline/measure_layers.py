"""Takes the tracer's rivals' measurements, and the tracer's own beside them, and compares them on one page."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pyarrow.parquet as pq

from layerplan.artifacts import write_text
from layerplan.config.measure import MEASUREMENTS, Measurement
from layerplan.config.run import RunConfig
from layerplan.measure.from_profile import convert_alignment, convert_semantic, price_tracing
from layerplan.measure.pilot import count_pilot_steps
from layerplan.measure.pool import measure_model
from layerplan.models.ref import ModelRef
from layerplan.pipeline.stages import RunContext, say, tracked
from layerplan.pipeline.texts import list_benchmark_texts
from layerplan.plan.cost import predict_cost
from layerplan.plan.decide import list_measurements
from layerplan.plan.layer_measurement import LayerMeasurement, LayerMeasurements
from layerplan.plan.policies import make_full_plan
from layerplan.report.measurements import draw_measurements, render_measurements
from layerplan.run_folder import MEASUREMENTS_STEM
from layerplan.tracer.pool import load_profile, trace_model

TRACED = "trace"
"""Stands for what the tracer measures among the names that may be asked for."""


def measure_layers(config: RunConfig, names: Sequence[str]) -> None:
    """Measures the layers in the named ways, all of them when none is named, and writes table and figure."""
    from layerplan.pipeline.base_model import prepare_model
    from layerplan.pipeline.checks import check_model
    from layerplan.pipeline.demands import ask_for_measuring
    from layerplan.pipeline.session import open_run

    check_model(config)
    asked = list(names) or [*MEASUREMENTS, TRACED]
    with open_run(config, ask_for_measuring) as context:
        model = prepare_model(context)
        found = measure(context, model, [name for name in MEASUREMENTS if name in asked], traces=TRACED in asked)
        shape = model.shape()
        text = render_measurements(found, shape, seq_len=config.measure.seq_len)
        write_text(context.folder.root / f"{MEASUREMENTS_STEM}.md", text)
        figure = context.folder.figures / f"{MEASUREMENTS_STEM}.svg"
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_measurements(found).savefig(figure)
        print(text)
        print(f"numbers   {context.folder.measurements} ({found.sha256[:12]})")
        print(f"figure    {figure}")


def measure(
    context: RunContext, model: ModelRef, wanted: Sequence[Measurement], *, traces: bool = False
) -> LayerMeasurements:
    """Takes the wanted measurements, and the tracer's when asked, and writes them, and no others, to the run's folder."""
    path = context.folder.measurements
    with tracked(context, "measure") as tracker:
        taken = measure_model(
            model,
            wanted,
            config=context.config.measure,
            train=context.config.train,
            corpus=context.config.corpus,
            out_dir=context.folder.root,
            questions=list_benchmark_texts(context.config),
            report=lambda line: say("measure", line),
        )
        if traces:
            taken += _trace(context, model)
        found = LayerMeasurements(model=model.identity(), measurements=taken).sealed()
        found.save(path)
        tracker.log_artifact(path)
    return found


def _trace(context: RunContext, model: ModelRef) -> list[LayerMeasurement]:
    """The tracer's profile, measured now when the run has none, as measurements."""
    folder, seconds = context.folder, None
    if not folder.profile.exists():
        say("measure", f"tracing the layers of {model}")
        began = time.perf_counter()
        trace_model(model, context.config.trace, out_dir=folder.root, report=lambda line: say("measure", line))
        seconds = time.perf_counter() - began
    profile = load_profile(folder.profile, context.config.trace)
    records = pq.read_table(folder.probes).to_pylist()
    identity, shape = model.identity(), model.shape()
    mean_length = max(2, round(sum(record["num_tokens"] for record in records) / len(records)))
    forward = predict_cost(make_full_plan(identity, shape), shape, seq_len=mean_length).forward_flops
    cost = price_tracing(profile, forward, records, seconds)
    return [convert_alignment(profile, cost), convert_semantic(profile, records, cost)]


def find_measurements(context: RunContext, model: ModelRef) -> LayerMeasurements | None:
    """What the run's plan reads: from its folder where all of it is there, measured now where not; None for nothing."""
    wanted = list_measurements(context.config.plan)
    if not wanted or context.folder.plan.exists():
        return None
    path = context.folder.measurements
    if path.exists():
        found = LayerMeasurements.load(path)
        there = {each.name: each for each in found.measurements}
        if set(wanted) <= set(there) and not is_of_other_steps(there.get("pilot"), context.config, wanted):
            say("measure", f"found {path}")
            return found
    say("measure", f"measuring the layers of {model}: {', '.join(wanted)}")
    return measure(context, model, wanted)


def is_of_other_steps(pilot: LayerMeasurement | None, config: RunConfig, wanted: Sequence[Measurement]) -> bool:
    """Whether the plan reads a pilot of another share of the run: `train.max_steps` may be raised after it was taken."""
    if pilot is None or "pilot" not in wanted:
        return False
    steps = count_pilot_steps(config.train.max_steps, config.measure.pilot_share)
    return bool(pilot.options.get("steps", steps) != steps)
