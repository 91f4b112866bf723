"""`layerplan generate`: what models make of a text, greedily, side by side."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="folders or hub ids; a run's folder is its trained model"
    )
    parser.add_argument("text", metavar="TEXT", help="what they continue")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="longest continuation (default 40)")
    parser.add_argument(
        "--chat", action="store_true", help="hand TEXT over as a user's turn, by the model's chat template"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run the models' own code")


def execute(args: argparse.Namespace) -> None:
    """Prints a continuation per model."""
    from layerplan.models.ref import ModelRef
    from layerplan.pipeline.generate import print_continuations

    models = [ModelRef(name, trust_remote_code=args.trust_remote_code) for name in args.models]
    print_continuations(models, args.text, tokens=args.tokens, is_chat=args.chat)
