"""`layerplan trace`: a model's layers measured, a plan made, both in one page; trains nothing."""

from __future__ import annotations

import argparse

from layerplan.entry import add_config_arguments, read_config_or_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments; `--probes` is short for `--set trace.probes=`."""
    add_config_arguments(parser, takes_model=True)
    parser.add_argument(
        "--probes",
        dest="set",
        action="append",
        type="trace.probes={}".format,
        metavar="FOLDER",
        help="AntSynNET folder or .jsonl file of probes",
    )


def execute(args: argparse.Namespace) -> None:
    """Traces the config's model or the named one, or says what it would do.

    Raises:
        ConfigError: When a model and a config are given.
    """
    config = read_config_or_model(args)
    if args.dry_run:
        from layerplan.pipeline.dry_run import print_trace_dry_run

        print_trace_dry_run(config)
    else:
        from layerplan.pipeline.trace_layers import trace_layers

        trace_layers(config)
