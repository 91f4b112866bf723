"""Measures the layers of a model, makes the freeze plan, and shows both in `report.html`; trains nothing."""

from __future__ import annotations

import argparse
import sys

from jobs.dry_run import print_dry_run
from jobs.entry import build_parser, run_job
from layerplan.config.run import RunConfig


def trace_layers(config: RunConfig, args: argparse.Namespace) -> None:
    """Runs the stages up to the plan."""
    if args.dry_run:
        print_dry_run(config)
        return
    from jobs.base_model import prepare_model
    from jobs.checks import check_model, check_probes
    from jobs.session import open_run
    from jobs.stages import decide_plan, publish_report, trace

    for check in (check_model, check_probes):
        check(config)
    with open_run(config) as context:
        model = prepare_model(context)
        plan = decide_plan(context, model, trace(context, model))
        report = publish_report(context)
        print(f"\nplan      {context.folder.plan} ({plan.sha256[:12]})")
        print(f"report    {report}")


def build_trace_parser() -> argparse.ArgumentParser:
    """The arguments of every job, and `--probes` for `--set trace.probes=`."""
    parser = build_parser("Measure a model's layers and make a freeze plan.")
    parser.add_argument(
        "--probes",
        dest="set",
        action="append",
        type="trace.probes={}".format,
        metavar="FOLDER",
        help="AntSynNET folder or .jsonl file of probes",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_job(trace_layers, build_trace_parser()))
