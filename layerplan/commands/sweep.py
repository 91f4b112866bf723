"""`layerplan sweep`: boundaries, sides, ends, learning rates and seeds searched with Ray Tune."""

from __future__ import annotations

import argparse

from layerplan.entry import add_config_arguments, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_config_arguments(parser)


def execute(args: argparse.Namespace) -> None:
    """Trains every candidate, or lists them with their cost."""
    from layerplan.pipeline.candidates import DEFAULT_SWEEP

    config = read_config(args)
    sweep = config.sweep or DEFAULT_SWEEP
    if args.dry_run:
        from layerplan.pipeline.sweep_dry_run import print_sweep_dry_run

        print_sweep_dry_run(config, sweep)
    else:
        from layerplan.pipeline.sweep_boundary import sweep_boundary

        sweep_boundary(config, sweep)
