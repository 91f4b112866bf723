"""`layerplan measure`: the numbers that others choose layers by, beside the tracer's, in one table; trains no plan."""

from __future__ import annotations

import argparse
import json

from layerplan.config.measure import MEASUREMENTS
from layerplan.entry import add_config_arguments, read_config_or_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments; `--text` is short for `--set corpus.sources=`."""
    add_config_arguments(parser, takes_model=True)
    parser.add_argument(
        "--text",
        dest="set",
        action="append",
        type=lambda path: f"corpus.sources={json.dumps([{'path': path}])}",
        metavar="PATH",
        help="file or folder of the text that is measured on; the config's corpus when left out",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=(*MEASUREMENTS, "trace"),
        help="take this measurement only; may be repeated",
    )


def execute(args: argparse.Namespace) -> None:
    """Measures the config's model or the named one, or says what it would do.

    Raises:
        ConfigError: When a model and a config are given.
    """
    config = read_config_or_model(args)
    if args.dry_run:
        from layerplan.pipeline.measure_dry_run import print_measure_dry_run

        print_measure_dry_run(config, args.only)
    else:
        from layerplan.pipeline.measure_layers import measure_layers

        measure_layers(config, args.only)
