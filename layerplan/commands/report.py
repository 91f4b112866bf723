"""`layerplan report`: the page of a run folder, written anew."""

from __future__ import annotations

import argparse

from layerplan.errors import ConfigError
from layerplan.pipeline.run_folder import open_named_run
from layerplan.storage.working import find_home


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", metavar="RUN_FOLDER", help="folder or address of a run, finished or not")


def execute(args: argparse.Namespace) -> None:
    """Writes `report.html` and prints where.

    Raises:
        ConfigError: When the folder is not one of a run.
    """
    folder = open_named_run(args.run)
    if not folder.config.exists():
        raise ConfigError(f"{find_home(folder.root)}: is no run folder (no resolved_config.json)")
    from layerplan.report.page import write_report

    report = write_report(folder.root)
    folder.carry()
    print(f"report    {find_home(report)}")
