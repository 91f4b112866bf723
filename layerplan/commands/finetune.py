"""`layerplan finetune`: next-token classification, each row trained from its own layer."""

from __future__ import annotations

import argparse

from layerplan.entry import add_config_arguments, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_config_arguments(parser)


def execute(args: argparse.Namespace) -> None:
    """Runs every stage that is not done yet, or says what it would do."""
    config = read_config(args)
    if args.dry_run:
        from layerplan.pipeline.finetune_dry_run import print_finetune_dry_run

        print_finetune_dry_run(config)
    else:
        from layerplan.pipeline.finetune import finetune

        finetune(config)
