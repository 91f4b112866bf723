"""`layerplan plan show|diff|price|scale|export|import`: plans read, compared, priced and carried to other tools; loads no
weights.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from layerplan.plan.exports import EXPORTS, READ
from layerplan.run_folder import PLAN_NAME

if TYPE_CHECKING:
    from layerplan.models.ref import ModelRef


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="what a plan trains, why, and what it costs")
    show.add_argument("plan", metavar="PLAN", help="freeze_plan.json, or the folder of a run or an export")
    diff = actions.add_parser("diff", help="what one plan trains and another does not")
    diff.add_argument("plans", nargs=2, metavar="PLAN", help="freeze_plan.json, or the folder of a run or an export")
    price = actions.add_parser("price", help="parameters, FLOPs and memory of plans for a model, from its config alone")
    price.add_argument("model", metavar="MODEL", help="folder or hub id")
    price.add_argument(
        "--plan", action="append", default=[], metavar="PLAN", help="price this plan too; may be repeated"
    )
    price.add_argument("--seq-len", type=int, default=4096, metavar="TOKENS", help="length of a row (default 4096)")
    _add_model_options(price)
    scale = actions.add_parser("scale", help="time of a step, memory, bytes and money on more and more nodes")
    scale.add_argument("config", metavar="CONFIG", help="YAML config or a resolved_config.json")
    scale.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override one field")
    scale.add_argument("--nodes", default="1,2,8,64", metavar="N,N", help="counts of nodes (default 1,2,8,64)")
    scale.add_argument("--workers-per-node", type=int, metavar="N", help="default: 8 GPUs, or one without GPUs")
    rates = scale.add_mutually_exclusive_group()
    rates.add_argument("--constants", metavar="FILE", help="what `layerplan cluster check --out FILE` measured")
    rates.add_argument("--device", choices=("H200", "H100"), default="H200", help="data sheet (default H200)")
    export = actions.add_parser("export", help="a plan in another tool's configuration")
    export.add_argument("plan", metavar="PLAN", help="freeze_plan.json, or the folder of a run or an export")
    export.add_argument("--to", required=True, choices=sorted(EXPORTS), help="whose configuration")
    export.add_argument("--model", required=True, metavar="MODEL", help="folder or hub id of the plan's model")
    _add_model_options(export)
    bring = actions.add_parser("import", help="another tool's configuration as a plan")
    bring.add_argument("file", metavar="FILE", help="YAML or JSON file of the tool")
    bring.add_argument("--from", dest="tool", required=True, choices=READ, help="whose configuration it is")
    bring.add_argument("--model", required=True, metavar="MODEL", help="folder or hub id it is for")
    _add_model_options(bring)
    bring.add_argument("--out", default=PLAN_NAME, metavar="FILE", help="where the plan goes")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a hub model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")


def execute(args: argparse.Namespace) -> None:
    """Prints what was asked for."""
    from layerplan.pipeline import plans

    match args.action:
        case "show":
            plans.print_plan(args.plan)
        case "diff":
            plans.print_difference(*args.plans)
        case "price":
            plans.print_prices(_read_model(args), args.plan, seq_len=args.seq_len)
        case "scale":
            from layerplan.config.load import load_config
            from layerplan.pipeline.scale import print_scale

            print_scale(
                load_config(args.config, args.set),
                args.nodes,
                device=args.device,
                constants=args.constants,
                workers_per_node=args.workers_per_node,
            )
        case "export":
            plans.print_export(args.plan, args.to, _read_model(args))
        case "import":
            plans.import_plan(args.file, args.tool, _read_model(args), args.out)


def _read_model(args: argparse.Namespace) -> ModelRef:
    from layerplan.models.ref import ModelRef

    return ModelRef(args.model, args.revision, args.trust_remote_code)
