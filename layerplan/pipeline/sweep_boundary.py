"""Ray Tune over boundaries: one training run per candidate plan, nested in one lineage, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from layerplan.artifacts import write_json
from layerplan.config.run import RunConfig
from layerplan.config.sweep import SweepConfig
from layerplan.errors import ConfigError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.base_model import prepare_model
from layerplan.pipeline.candidates import make_candidates, name_trial
from layerplan.pipeline.checks import check_corpus, check_model
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.pipeline.session import open_run
from layerplan.pipeline.stages import RunContext, ask_loss, build_store, make_train_request, say, tracked
from layerplan.report.lineage import list_trial_results, render_sweep
from layerplan.run_folder import SWEEP_NAME, SWEEP_RESULTS_NAME, RunFolder
from layerplan.storage.working import find_home
from layerplan.sweep.objective import Trial
from layerplan.sweep.search import check_search, save_search
from layerplan.sweep.tuner import TrialResult, run_sweep
from layerplan.tracking.outbox import Status
from layerplan.tracking.tracker import NOTE_TAG, RunSinkFactory, Tracker, status_of


def sweep_boundary(config: RunConfig, sweep: SweepConfig) -> None:
    """Trains every candidate and prints them, best first.

    Raises:
        ConfigError: When the run is stored at an address: Ray Tune keeps its trials in a folder.
    """
    home = find_home(locate_run_folder(config).root)
    if not isinstance(home, Path):
        raise ConfigError(f"storage_path={home.parent}: a sweep keeps its trials in a local or shared folder; set one")
    for check in (check_model, check_corpus):
        check(config)
    check_search(sweep, locate_run_folder(config).sweep)
    with open_run(config) as context:
        model = prepare_model(context)
        recipe = ask_loss(context, model)
        store = build_store(context, model)
        with tracked(context, SWEEP_NAME) as tracker:
            trials, runs = make_trials(context, tracker, model, sweep)
            save_search(sweep, context.folder.sweep)
            request = make_train_request(context, model, trials[0].plan, store, None)
            train = config.train.model_copy(
                update={
                    "max_steps": sweep.max_steps,
                    "checkpoint_every_steps": min(config.train.checkpoint_every_steps, sweep.max_steps),
                    "validate_every_steps": min(config.train.validate_every_steps, sweep.max_steps),
                }
            )
            request = replace(request, run_dir=context.folder.sweep, config=train, recipe=recipe)
            with end_trials(runs) as finish:
                results = run_sweep(sweep, request, trials, finish)
            write_json(context.folder.sweep / SWEEP_RESULTS_NAME, [vars(result) for result in results])
            tracker.log_artifact(context.folder.sweep / SWEEP_RESULTS_NAME)
            _note_best(context.tracker, results)
        print_results(results)


def make_trials(
    context: RunContext, tracker: Tracker, model: ModelRef, sweep: SweepConfig
) -> tuple[list[Trial], dict[str, Tracker]]:
    """One trial per candidate, each with its plan saved and its nested run opened.

    Returns:
        The trials, and their runs by the trials' names.

    Raises:
        ConfigError: When a boundary does not fit the model.
    """
    config = context.config
    candidates = make_candidates(config, sweep, model.identity(), model.shape())
    trials, runs = [], {}
    for boundary, plan in candidates.items():
        name = name_trial(boundary)
        folder = context.folder.sweep / name
        plan.save(RunFolder(folder).plan)
        child = runs[name] = tracker.child(f"sweep_{name}")
        child.log_params({"boundary": boundary, "plan_sha256": plan.sha256})
        child.set_tags({"layerplan.plan_sha256": plan.sha256, "layerplan.plan_type": plan.plan_type})
        child.log_artifact(RunFolder(folder).plan)
        trials.append(Trial(name, plan, RunSinkFactory(RunFolder(folder).metrics, name, child)))
    say("sweep", f"{len(trials)} boundaries: {', '.join(map(str, candidates))}")
    return trials, runs


@contextmanager
def end_trials(runs: Mapping[str, Tracker]) -> Iterator[Callable[[TrialResult], None]]:
    """Gives what ends a trial's run with its numbers, and ends those that are left when the search ended without them."""
    left = dict(runs)

    def finish(result: TrialResult) -> None:
        run = left.pop(result.name)
        run.log_metrics(list_trial_results(vars(result)), step=result.step)
        run.close(status="FINISHED")

    status: Status = "FAILED"
    try:
        yield finish
    except BaseException as error:
        status = status_of(error)
        raise
    finally:
        for run in left.values():
            run.close(status=status)


def _note_best(tracker: Tracker, results: Sequence[TrialResult]) -> None:
    tracker.set_tags({NOTE_TAG: render_sweep([vars(result) for result in results])})
    tracker.log_metrics(list_trial_results(vars(results[0])), step=results[0].step)


def print_results(results: Sequence[TrialResult]) -> None:
    """Prints the trials, best first."""
    table = Table(title="Boundary sweep, lowest validation loss first")
    for heading in ("boundary", "steps", "validation loss", "training loss", "FLOPs of full", "tokens/s"):
        table.add_column(heading, justify="right")
    for item in results:
        table.add_row(
            str(item.boundary),
            str(item.step),
            "-" if item.validation_loss is None else f"{item.validation_loss:.4f}",
            f"{item.train_loss:.4f}",
            f"{item.flops_share:.1%}",
            "-" if item.tokens_per_s is None else f"{item.tokens_per_s:,.0f}",
        )
    Console(width=120).print(table)
