"""Scores any Hugging Face folder or hub id: `--model FOLDER --out FOLDER`, or the base model of the config."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.artifacts import Results
from eval.items import load_benchmark
from eval.runner import evaluate_model
from eval.significance import compute_wilson
from jobs.entry import build_parser, run_job
from layerplan.config.load import dump_config
from layerplan.config.model import PretrainedModelConfig
from layerplan.config.run import RunConfig
from layerplan.errors import ConfigError
from layerplan.ray_session import connect


def evaluate(config: RunConfig, args: argparse.Namespace) -> None:
    """Scores the model and prints a table."""
    model = args.model or (config.model.name if isinstance(config.model, PretrainedModelConfig) else None)
    if model is None:
        raise ConfigError(
            "--model: is required when the config's model is made from scratch; a folder or hub id is expected"
        )
    out_dir = Path(args.out or Path(config.storage_path) / config.name / "evaluation" / Path(model).name).resolve()
    if args.dry_run:
        print(dump_config(config))
        for benchmark in map(load_benchmark, config.evaluation.benchmarks):
            print(f"{benchmark.name}: {len(benchmark.questions):,} questions of {len(benchmark.subjects)} subjects")
        return
    connect(
        config.cluster, min_cpus=config.evaluation.num_cpus_per_actor, min_gpus=config.evaluation.num_gpus_per_actor
    )
    print_scores(evaluate_model(model, config.evaluation, out_dir))
    print(f"\nanswers   {out_dir}")


def print_scores(results: Results) -> None:
    """Prints every average by its name, with the Wilson interval of the question-weighted one."""
    table = Table(title="Accuracy, percent")
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
    parser.add_argument("--model", help="folder or hub id; the config's base model when left out")
    parser.add_argument("--out", help="folder for the scores")
    sys.exit(run_job(evaluate, parser))
