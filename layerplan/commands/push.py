"""`layerplan push`: a finished run to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run", metavar="RUN_FOLDER", help="folder of a finished run")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where to; made when it is not there")
    parser.add_argument("--public", action="store_true", help="a repository that is made is seen by everybody")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded; ask nobody")


def execute(args: argparse.Namespace) -> None:
    """Uploads model, card, plan and scores in one commit; the token is that of `hf auth login` or HF_TOKEN."""
    from layerplan.pipeline.push import describe, list_pushed, push

    run = Path(args.run).expanduser().resolve()
    print(describe(list_pushed(run)))
    if not args.dry_run:
        print(f"pushed    {push(run, args.repository, is_public=args.public)}")
