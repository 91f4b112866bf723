"""`layerplan evaluate`: any model folder or hub id, or checkpoints of a run that were not scored beside its training."""

from __future__ import annotations

import argparse

from layerplan.entry import add_config_arguments, read_config
from layerplan.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add_config_arguments(parser, takes_model=True)
    parser.add_argument("--model", dest="named", metavar="MODEL", help="the same as MODEL")
    parser.add_argument("--out", help="folder for the scores")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME[=PATH]",
        help="ceval and cmmlu, each `hub`, a folder, or `builtin` (a small set of ours, asked by a NAME alone);"
        " the config's when left out",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="*",
        type=int,
        metavar="STEP",
        help="checkpoints of the config's run; all when none named",
    )


def execute(args: argparse.Namespace) -> None:
    """Scores, or says what would be asked.

    Raises:
        ConfigError: When no model is named.
    """
    args.model = args.model or args.named
    if args.benchmarks:
        pairs = [item.partition("=") for item in args.benchmarks]
        chosen = [f"{{name: {name}, path: {path or 'builtin'!r}}}" for name, _, path in pairs]
        args.set.append(f"evaluation.benchmarks=[{', '.join(chosen)}]")
    config = read_config(args)
    if args.checkpoints is not None:
        from layerplan.pipeline.evaluate import score_run

        score_run(config, args.checkpoints, is_dry_run=args.dry_run)
        return
    model = args.model or getattr(config.model, "name", None)
    if model is None:
        raise ConfigError("--model: is required when the run makes its model itself; a folder or hub id is expected")
    from layerplan.pipeline.evaluate import evaluate, print_dry_run
    from layerplan.pipeline.model_options import find_named

    model = find_named(model, config)
    if args.dry_run:
        print_dry_run(config)
    else:
        evaluate(config, model, args.out)
