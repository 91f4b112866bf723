"""The front door: `layerplan COMMAND ...`. The scripts in `jobs/` are the same commands under the names `ray job submit` takes.

A command's module is imported when it is chosen, so that help answers at once. Each has `add_arguments(parser)` and
`execute(args)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

COMMANDS = {
    "run": ("layerplan.commands.run", "trace, plan, train, score and judge: the whole chain of a config"),
    "trace": ("layerplan.commands.trace", "measure a model's layers and make a freeze plan; trains nothing"),
    "measure": ("layerplan.commands.measure", "take the measurements others choose layers by, and compare them"),
    "finetune": (
        "layerplan.commands.finetune",
        "train on prompts whose next token is a label, each from its own layer",
    ),
    "plan": ("layerplan.commands.plan", "show, compare and price freeze plans, or carry them to other tools"),
    "corpus": ("layerplan.commands.corpus", "build a token store from raw text, or verify one"),
    "evaluate": ("layerplan.commands.evaluate", "score a model on C-Eval and CMMLU"),
    "sweep": ("layerplan.commands.sweep", "train several boundaries with Ray Tune and rank them"),
    "compare": ("layerplan.commands.compare", "judge finished runs against their base and each other"),
    "ledger": ("layerplan.commands.ledger", "prove from their ledgers what runs trained on"),
    "track": ("layerplan.commands.track", "send a tracking store what did not arrive while it was down"),
    "convert": ("layerplan.commands.convert", "make a safetensors folder of a GGUF file"),
    "merge": ("layerplan.commands.merge", "merge an adapter of PEFT into its base"),
    "generate": ("layerplan.commands.generate", "continue a text with models, side by side"),
    "push": ("layerplan.commands.push", "upload a finished run's model, card, plan and scores to the Hugging Face hub"),
    "cluster": ("layerplan.commands.cluster", "check the nodes of a cluster, or see which runs share it"),
    "status": ("layerplan.commands.status", "show how a run is doing, live in a terminal, from its folder alone"),
    "report": ("layerplan.commands.report", "write the page of a run folder anew"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 a fault while running, 2 a bad config or command line.

    Args:
        argv: The command and its arguments; the process's own when left out.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser(words[0] if words else "").parse_args(words)
    from layerplan.entry import run_guarded

    work = partial(import_module(COMMANDS[args.command][0]).execute, args)
    return run_guarded(work, style=args.log, level=args.level)


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser with every command's name, and the arguments of one of them."""
    parser = argparse.ArgumentParser(
        prog="layerplan",
        description="Measure a model's layers, plan what to freeze, continue pre-training on Ray, judge the result.",
    )
    parser.add_argument("--version", action="version", version=_read_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        child = commands.add_parser(name, help=summary, description=summary[:1].upper() + summary[1:] + ".")
        if name == command:
            import_module(module).add_arguments(child)
            for leaf in _list_leaves(child):
                _add_log_arguments(leaf)
    return parser


def _list_leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of a command's actions, or its own when it has none."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for action in actions for leaf in action.choices.values()] or [parser]


def _add_log_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is said on the way, on standard error")
    level = group.add_mutually_exclusive_group()
    level.add_argument("--verbose", dest="level", action="store_const", const="DEBUG", help="what engines say too")
    level.add_argument("--quiet", dest="level", action="store_const", const="WARNING", help="warnings and errors only")
    group.add_argument("--log", choices=("text", "json"), help="lines for people (default) or JSON lines")


def _read_version() -> str:
    from layerplan import __version__

    return f"layerplan {__version__}"


if __name__ == "__main__":
    sys.exit(main())
