"""Raw text to a token store, without tracing or training anything."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from jobs.dry_run import print_dry_run
from jobs.entry import build_parser, run_job
from jobs.run_folder import open_run_folder
from layerplan.config.run import RunConfig
from layerplan.corpus.manifest import Manifest


def build_corpus(config: RunConfig, args: argparse.Namespace) -> None:
    """Builds the store and prints its counts."""
    if args.dry_run:
        print_dry_run(config)
        return
    from jobs.base_model import prepare_model
    from jobs.checks import check_benchmarks, check_corpus, check_model
    from jobs.session import open_run
    from jobs.stages import build_store

    for check in (check_model, check_corpus, check_benchmarks):
        check(config)
    with open_run(config, open_run_folder(config)) as context:
        store = build_store(context, prepare_model(context))
    manifest = Manifest.load(store)
    table = Table(title=f"{store}")
    table.add_column("documents")
    table.add_column("count", justify="right")
    for name, count in manifest.counts.items():
        table.add_row(name, f"{count:,}")
    table.add_row("rows", f"{manifest.num_rows:,}")
    table.add_row("tokens", f"{manifest.num_tokens:,}")
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(run_job(build_corpus, build_parser("Build a token store from raw text.")))
