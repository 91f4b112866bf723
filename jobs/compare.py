"""Verdicts over finished runs: `python jobs/compare.py RUN_FOLDER [RUN_FOLDER ...] [--out FILE]`.

The untouched base of the first run is arm zero; every run is compared with it, and p-values are corrected over all
comparisons made. Runs scored under unequal protocols cannot be put into one table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.artifacts import load_answers, load_results
from eval.significance import Verdict, judge_pairs
from jobs.entry import run_guarded
from jobs.stages import write_json
from jobs.summary import print_verdicts
from layerplan.errors import EvaluationError

BASE = "base"


def compare(args: argparse.Namespace) -> None:
    """Compares the runs and prints the table."""
    verdicts = judge_runs([Path(run) for run in args.runs])
    print_verdicts(verdicts)
    if args.out:
        write_json(Path(args.out), [verdict.model_dump(mode="json") for verdict in verdicts])
        print(f"\nverdicts  {Path(args.out).resolve()}")


def judge_runs(runs: Sequence[Path]) -> list[Verdict]:
    """Verdicts of every run, benchmark and protocol against the first run's base.

    Raises:
        EvaluationError: When a run has no scores, or protocols differ.
    """
    base_dir = runs[0] / "evaluation" / BASE
    base = load_results(base_dir)
    if not base:
        raise EvaluationError(f"{base_dir}: has no scores; the first run must have evaluated its base")
    pairs = []
    for run in runs:
        folder = find_trained_scores(run)
        results = load_results(folder)
        for key, reference in base.items():
            if key not in results:
                raise EvaluationError(f"{folder}: has no {key}; the base has {', '.join(base)}")
            result = results[key]
            answers = [load_answers(where, result.benchmark, result.protocol) for where in (base_dir, folder)]
            pairs.append((("the base", reference, answers[0]), (run.name, result, answers[1])))
    return judge_pairs(pairs)


def find_trained_scores(run: Path) -> Path:
    """The newest scored checkpoint of a run.

    Raises:
        EvaluationError: When the run has none.
    """
    scored = sorted(path for path in (run / "evaluation").glob("step_*") if any(path.glob("*.json")))
    if not scored:
        raise EvaluationError(f"{run}: has no scored checkpoint below evaluation/")
    return scored[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare finished runs with their base.")
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="finished run folders")
    parser.add_argument("--out", help="file for the verdicts as JSON")
    sys.exit(run_guarded(lambda: compare(parser.parse_args())))
