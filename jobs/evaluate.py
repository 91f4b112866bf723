"""Scores any Hugging Face folder, GGUF file or hub id: `--model FOLDER --out FOLDER`, or the base model of the config.

`--checkpoints` scores checkpoints of the config's own run that were not scored beside its training: all, or some steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.artifacts import Results
from eval.during_training import find_checkpoints
from eval.items import load_benchmark
from eval.runner import evaluate_model
from eval.significance import compute_wilson
from jobs.entry import build_parser, run_job
from jobs.model_options import find_named, trusts_remote_code
from jobs.run_folder import RunFolder, open_run_folder
from jobs.session import open_run
from layerplan.config.load import dump_config
from layerplan.config.model import PretrainedModelConfig
from layerplan.config.run import RunConfig
from layerplan.errors import ConfigError, EvaluationError
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.ray_session import connect


def evaluate(config: RunConfig, args: argparse.Namespace) -> None:
    """Scores the model and prints a table."""
    if args.checkpoints is not None:
        score_run(config, args.checkpoints)
        return
    model = args.model or (config.model.name if isinstance(config.model, PretrainedModelConfig) else None)
    if model is None:
        raise ConfigError(
            "--model: is required when the config's model is made from scratch; a folder or hub id is expected"
        )
    model = find_named(model, config)
    out_dir = Path(args.out or Path(config.storage_path) / config.name / "evaluation" / Path(model).name).resolve()
    if args.dry_run:
        print(dump_config(config))
        for benchmark in map(load_benchmark, config.evaluation.benchmarks):
            print(f"{benchmark.name}: {len(benchmark.questions):,} questions of {len(benchmark.subjects)} subjects")
        return
    engines = config.evaluation
    connect(
        config.cluster,
        min_cpus=engines.num_actors * engines.num_cpus_per_actor,
        min_gpus=engines.num_actors * engines.num_gpus_per_actor,
    )
    print_scores(evaluate_model(model, config.evaluation, out_dir, trust_remote_code=trusts_remote_code(config, model)))
    print(f"\nanswers   {out_dir}")


def score_run(config: RunConfig, steps: list[int]) -> None:
    """Scores checkpoints of the config's run; no steps mean all that are there.

    Raises:
        EvaluationError: When the run has no plan or no complete checkpoint of a step.
    """
    from jobs.base_model import prepare_model
    from jobs.stages import describe_scoring, score_checkpoints

    folder = RunFolder(Path(config.storage_path).expanduser().resolve() / config.name)
    there = list(find_checkpoints(folder.root))
    missing = [step for step in steps if step not in there]
    if missing or not there or not folder.plan.exists():
        raise EvaluationError(
            f"{folder.root}: has no complete checkpoint of {f'step {missing[0]}' if missing else 'any step'};"
            f" there are {', '.join(map(str, there)) or 'none'}"
        )
    with open_run(config, open_run_folder(config), trains=False) as context:
        model = prepare_model(context)
        scoring = describe_scoring(context, model, FreezePlan.load(folder.plan))
        for step, results in score_checkpoints(context, scoring, steps or there).items():
            print_scores(results, title=f"Step {step}: accuracy, percent")
    print(f"\nanswers   {folder.evaluation}")


def print_scores(results: Results, *, title: str = "Accuracy, percent") -> None:
    """Prints every average by its name, with the Wilson interval of the question-weighted one."""
    table = Table(title=title)
    for heading in (
        "benchmark/protocol",
        "asked",
        "unparsed",
        "mean of categories",
        "mean of subjects",
        "of questions [95 %]",
    ):
        table.add_column(heading)
    for key, result in results.items():
        low, high = compute_wilson(result.num_correct, result.num_asked)
        table.add_row(
            key,
            str(result.num_asked),
            str(result.num_unparsed),
            f"{result.category_mean:.1f}",
            f"{result.subject_mean:.1f}",
            f"{result.question_mean:.1f} [{low:.1f}, {high:.1f}]",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = build_parser("Score a model on C-Eval and CMMLU.")
    parser.add_argument("--model", help="folder, GGUF file or hub id; the config's base model when left out")
    parser.add_argument("--out", help="folder for the scores")
    parser.add_argument(
        "--checkpoints",
        nargs="*",
        type=int,
        metavar="STEP",
        help="checkpoints of the config's run; all when none named",
    )
    sys.exit(run_job(evaluate, parser))
