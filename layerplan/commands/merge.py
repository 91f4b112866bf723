"""`layerplan merge`: an adapter of PEFT merged into its base."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder in PEFT's format, such as RUN/adapters/step_X")
    parser.add_argument("base", metavar="MODEL", help="folder or hub id of its base")
    parser.add_argument("out", metavar="FOLDER", help="folder that is made")


def execute(args: argparse.Namespace) -> None:
    """Writes the merged model."""
    from layerplan.models.ref import ModelRef
    from layerplan.pipeline.merge_adapter import merge_adapter

    out = Path(args.out).expanduser()
    merge_adapter(Path(args.adapter).expanduser(), ModelRef(args.base), out)
    logger.info("merged into %s", out)
