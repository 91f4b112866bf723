"""`layerplan report`: the page of a run folder, written anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from layerplan.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", metavar="RUN_FOLDER", help="folder of a run, finished or not")


def execute(args: argparse.Namespace) -> None:
    """Writes `report.html` and prints where.

    Raises:
        ConfigError: When the folder is not one of a run.
    """
    run = Path(args.run).expanduser().resolve()
    if not (run / "resolved_config.json").exists():
        raise ConfigError(f"{run}: is no run folder (no resolved_config.json)")
    from layerplan.report.page import write_report

    print(f"report    {write_report(run)}")
