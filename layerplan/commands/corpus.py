"""`layerplan corpus build` and `layerplan corpus verify`."""

from __future__ import annotations

import argparse

from layerplan.entry import add_config_arguments, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_config_arguments(actions.add_parser("build", help="raw text to a token store; trains nothing"))
    verify = actions.add_parser("verify", help="compare every file of a token store with what was written")
    verify.add_argument("store", metavar="STORE", help="folder or address of a token store")


def execute(args: argparse.Namespace) -> None:
    """Builds or verifies a store."""
    if args.action == "verify":
        from layerplan.pipeline.verify_store import verify

        verify(args.store)
        return
    config = read_config(args)
    if args.dry_run:
        from layerplan.pipeline.dry_run import print_corpus_dry_run

        print_corpus_dry_run(config)
    else:
        from layerplan.pipeline.build_corpus import build_corpus

        build_corpus(config)
