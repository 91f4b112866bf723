"""Scores any Hugging Face folder or hub id, or checkpoints of a run that were not scored beside its training."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.artifacts import Results
from eval.during_training import find_checkpoints
from eval.items import load_benchmark
from eval.runner import evaluate_model
from eval.significance import compute_wilson
from eval.subjects import is_builtin
from layerplan.config.load import dump_config
from layerplan.config.run import RunConfig
from layerplan.errors import EvaluationError
from layerplan.inside import lies_inside
from layerplan.models.ref import ModelRef
from layerplan.pipeline.demands import ask_for_scoring
from layerplan.pipeline.file_checks import check_benchmarks
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.pipeline.run_lease import hold_run
from layerplan.pipeline.session import on_cluster, open_run
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.report.headline import describe_built_in
from layerplan.storage.mirror import carry_folder, fetch_file, fetch_folder
from layerplan.storage.working import find_home


def evaluate(config: RunConfig, model: ModelRef, out: str | None = None) -> None:
    """Scores the model and prints a table; the arguments are those of `score_model`."""
    out_dir = Path(out or locate_run_folder(config).evaluation / Path(model.name).name).resolve()
    print_scores(score_model(config, model, out_dir))
    print(f"\nanswers   {find_home(out_dir)}")


def score_model(config: RunConfig, model: ModelRef, out_dir: str | Path) -> Results:
    """Scores any model.

    Args:
        config: Whose evaluation settings hold.
        model: The model, with the consent to its code.
        out_dir: Folder for the scores.
    """
    check_benchmarks(config)
    root, folder = locate_run_folder(config).root, Path(out_dir).resolve()
    home = find_home(root)
    with hold_run(home, config.name) if home.is_dir() and lies_inside(folder, root) else nullcontext() as lease:
        fetch_folder(folder)
        with on_cluster(config, ask_for_scoring(config), tell=None if lease is None else lease.tell):
            results = evaluate_model(model.at_commit(), config.evaluation, folder)
        carry_folder(folder)
        return results


def print_dry_run(config: RunConfig) -> None:
    """Prints the resolved config and what would be asked."""
    print(dump_config(config))
    for benchmark in map(load_benchmark, config.evaluation.benchmarks):
        print(f"{benchmark.name}: {len(benchmark.questions):,} questions of {len(benchmark.subjects)} subjects")


def score_run(config: RunConfig, steps: list[int], *, is_dry_run: bool) -> None:
    """Scores checkpoints of the config's run, or says which it would; no steps mean all that are there.

    Raises:
        EvaluationError: When the run has no plan or no complete checkpoint of a step.
    """
    from layerplan.pipeline.base_model import prepare_model
    from layerplan.pipeline.stages import describe_scoring, score_checkpoints

    folder = locate_run_folder(config)
    fetch_file(folder.plan)
    there = list(find_checkpoints(folder.root))
    missing = [step for step in steps if step not in there]
    if missing or not there or not folder.plan.exists():
        raise EvaluationError(
            f"{folder.root}: has no complete checkpoint of {f'step {missing[0]}' if missing else 'any step'};"
            f" there are {', '.join(map(str, there)) or 'none'}"
        )
    if is_dry_run:
        print_dry_run(config)
        print(f"checkpoints of steps {', '.join(map(str, steps or there))}, below {folder.root}")
        return
    with open_run(config, ask_for_scoring) as context:
        model = prepare_model(context)
        scoring = describe_scoring(context, model, FreezePlan.load(folder.plan))
        for step, results in score_checkpoints(context, scoring, steps or there).items():
            print_scores(results, title=f"Step {step}: accuracy, percent")
    print(f"\nanswers   {find_home(folder.evaluation)}")


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
    built_in = [result.benchmark for result in results.values() if is_builtin(result.subjects)]
    if built_in:
        print(f"note      {describe_built_in(list(dict.fromkeys(built_in)))}")
