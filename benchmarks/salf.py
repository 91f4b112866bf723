"""The race: fine-tuning methods at equal backward cost, over tasks and seeds, and its tables in the layout of SALF's own.

    export LAYERPLAN_DATA=/path/to/data
    python benchmarks/salf.py run benchmarks/races/salf_scratch.yaml --model runs/salf_base
    python benchmarks/salf.py tables            # benchmarks/results/salf.md from the results kept beside it

`run` goes on where it was cut. Arms run in one process (`benchmarks/salf_bench.py`); an arm is what `layerplan finetune` makes
of the same config, whose weights and predictions it equals byte for byte.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "salf"


def main() -> None:
    """Runs a race, or renders what was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("race", type=Path)
    run.add_argument("--model", help="folder of the base, where it is not the one in the file")
    run.add_argument("--storage", type=Path, default=Path("runs/race"))
    run.add_argument("--results", type=Path, help="file of results; beside the tables when left out")
    tables = commands.add_parser("tables")
    tables.add_argument("--out", type=Path, default=RESULTS.parent / "salf.md")
    args = parser.parse_args()
    if args.command == "tables":
        from salf_tables import write_page

        write_page(RESULTS, args.out)
        return
    if "LAYERPLAN_DATA" not in os.environ:
        sys.exit("LAYERPLAN_DATA is not set: name the folder that has ceval, cmmlu and antsynnet")
    import torch
    from salf_race import Race, run_race

    torch.set_num_threads(1)
    results = args.results or RESULTS / f"{args.race.stem}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    for line in run_race(Race.load(args.race), args.storage / args.race.stem, results, model=args.model):
        print(line, flush=True)


if __name__ == "__main__":
    main()
