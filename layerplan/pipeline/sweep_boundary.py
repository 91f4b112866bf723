"""Ray Tune over boundaries and what goes with them: one training per trial, nested in one lineage, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from layerplan.artifacts import write_json
from layerplan.config.run import RunConfig
from layerplan.config.sweep import SweepConfig
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.rows import PackedRows
from layerplan.errors import ConfigError, TrainingError
from layerplan.pipeline.base_model import prepare_model
from layerplan.pipeline.candidates import Candidate, make_candidates
from layerplan.pipeline.checks import check_model, check_rows
from layerplan.pipeline.file_checks import check_corpus
from layerplan.pipeline.held_out_texts import pack_texts
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.pipeline.session import open_run
from layerplan.pipeline.stages import RunContext, ask_loss, build_store, make_train_request, say, tracked
from layerplan.pipeline.sweep_checks import check_sweep, list_unused_scoring
from layerplan.pipeline.sweep_rating import measure_for_search
from layerplan.pipeline.trial_runs import TrialRuns, closing_runs
from layerplan.report.lineage import list_trial_results, render_sweep
from layerplan.report.page import write_report
from layerplan.run_folder import (
    BASE,
    HELD_OUT_ROWS_NAME,
    ROW_LOSSES_NAME,
    SWEEP_CHOICE_NAME,
    SWEEP_NAME,
    SWEEP_RESULTS_NAME,
    RunFolder,
)
from layerplan.storage.working import find_home
from layerplan.sweep.choosers import make_chooser
from layerplan.sweep.objective import Trial, make_request
from layerplan.sweep.room import TrialNeeds, choose_concurrency, read_nodes
from layerplan.sweep.schedule import find_report_spacing
from layerplan.sweep.search import (
    check_judged_rows,
    check_plans,
    check_search,
    check_trained_rows,
    leave_out_other_rows,
    save_search,
)
from layerplan.sweep.space import Point
from layerplan.sweep.tuner import run_sweep
from layerplan.tracking.tracker import NOTE_TAG, NoopTracker, RunSinkFactory, Tracker
from layerplan.train.held_out_rows import save_texts
from layerplan.train.ray_trainer import describe_worker
from layerplan.train.request import Judging, TrainRequest
from layerplan.train.trainer import export_result
from layerplan.train.trial_record import TrialRecord, load_records


def sweep_boundary(config: RunConfig, sweep: SweepConfig) -> None:
    """Searches the space, exports the best trial's model, and prints the trials, best first.

    Raises:
        ConfigError: When the run is stored at an address: its trials are kept in a folder.
        ClusterError: When so many trials will never fit into the cluster.
        TrainingError: When a trial failed; the others are kept.
    """
    home = find_home(locate_run_folder(config).root)
    if not isinstance(home, Path):
        raise ConfigError(f"storage_path={home.parent}: a sweep keeps its trials in a local or shared folder; set one")
    for check in (check_model, check_rows, check_corpus):
        check(config)
    check_sweep(config, sweep)
    check_search(sweep, locate_run_folder(config).sweep)
    with open_run(config) as context:
        for line in list_unused_scoring(config):
            say("sweep", line)
        at_once = find_concurrency(context.config, sweep)
        model = prepare_model(context)
        candidates = make_candidates(context.config, sweep, model.identity(), model.shape())
        recipe = ask_loss(context, model)
        store = build_store(context, model)
        corpus_sha256 = Manifest.load(store).content_sha256
        check_trained_rows(corpus_sha256, context.folder.sweep)
        rate = measure_for_search(context, model, sweep.search)
        with tracked(context, SWEEP_NAME) as tracker:
            trials = make_trials(context, sweep, candidates)
            check_plans(trials.values(), context.folder.sweep)
            texts = pack_texts(context.config, model)
            check_judged_rows(sweep.metric, texts, context.folder.sweep, trials.values())
            save_search(sweep, context.folder.sweep, corpus_sha256)
            base = make_train_request(context, model, candidates[0].plan, store, None)
            request = replace(make_shared_request(context, texts, sweep, base), recipe=recipe)
            records, failed = search(context, tracker, sweep, request, trials, rate, at_once)
            records = [leave_out_other_rows(record, texts, context.folder.sweep) for record in records]
            if records:
                chosen = choose(context, tracker, request, trials, records)
                note_results(context, tracker, records)
                report = write_report(context.folder.root)
                tracker.log_artifact(report)
                print_results(records)
                print(f"report    {report}")
                print(f"chosen    {chosen}")
            if failed:
                raise TrainingError(
                    f"sweep: {len(failed)} of {len(failed) + len(records)} trials failed; the first, {failed[0].name}:"
                    f" {failed[0].error}"
                )


def find_concurrency(config: RunConfig, sweep: SweepConfig) -> int:
    """Trials that run at once, by what the cluster has; nothing is started before that is known to fit."""
    whole, free = read_nodes()
    needs = TrialNeeds(config.train.most_workers, describe_worker(config.train))
    at_once, line = choose_concurrency(sweep.max_concurrent_trials, needs, whole=whole, free=free)
    if line:
        say("sweep", line)
    return at_once


def make_trials(context: RunContext, sweep: SweepConfig, candidates: Sequence[Candidate]) -> dict[str, Trial]:
    """The trials by name; their runs in the lineage are opened when they begin."""
    trials = {}
    for each in candidates:
        name = each.point.name
        sinks = RunSinkFactory(RunFolder(context.folder.sweep / name).metrics, name, NoopTracker())
        spacing = find_report_spacing(sweep, each.steps)
        trials[name] = Trial(each.point, each.plan, each.steps, each.flops, sinks, spacing)
    return trials


def make_shared_request(
    context: RunContext, texts: Mapping[str, PackedRows], sweep: SweepConfig, request: TrainRequest
) -> TrainRequest:
    """What all trials have in common, the rows they are judged by included."""
    folder = context.folder.sweep
    rows = folder / HELD_OUT_ROWS_NAME if texts else None
    if rows is not None:
        save_texts(rows, texts)
    judging = Judging(sweep.metric, rows, folder / BASE / ROW_LOSSES_NAME, folder)
    (folder / BASE).mkdir(parents=True, exist_ok=True)
    return replace(request, run_dir=folder, judging=judging, records=())


def search(
    context: RunContext,
    tracker: Tracker,
    sweep: SweepConfig,
    request: TrainRequest,
    trials: Mapping[str, Trial],
    rate: Callable[[Point], float] | None,
    at_once: int,
) -> tuple[list[TrialRecord], list[TrialRecord]]:
    """Runs what is new of the space; returns all of its trials that ended, best first, and those that failed now."""
    folder, points = context.folder.sweep, [trial.point for trial in trials.values()]
    ended = find_ended(folder, trials, sweep)
    begun = [name for name in trials if RunFolder(folder / name).plan.exists()]
    chooser = make_chooser(sweep.search, points, rate, begun)
    left = f", {len(ended)} of them ended before" if ended else ""
    say("sweep", f"{sweep.search.type} search of {len(points)} trials{left}; {at_once} at once")
    runs = TrialRuns(tracker, folder, trials, [item.name for item in context.config.evaluation.held_out])
    with closing_runs(runs):
        run_sweep(sweep, request, trials, chooser, ended, at_once=at_once, on_begin=runs.begin, on_end=runs.end)
    records = [record.judged_by(sweep.metric) for record in load_records(folder) if record.name in trials]
    return sorted(records, key=lambda record: record.sort_key), runs.failed


def find_ended(folder: Path, trials: Mapping[str, Trial], sweep: SweepConfig) -> list[TrialRecord]:
    """Trials of the space that need not be run again: those at their last step, and with `asha` those that it stopped."""
    return [
        record
        for record in (each.judged_by(sweep.metric) for each in load_records(folder))
        if record.name in trials and record.loss is not None and (not record.was_stopped or sweep.scheduler == "asha")
    ]


def choose(
    context: RunContext,
    tracker: Tracker,
    request: TrainRequest,
    trials: Mapping[str, Trial],
    records: Sequence[TrialRecord],
) -> Path:
    """Exports the model of the best trial, and of no other; returns its folder."""
    best = records[0]
    trial_request = make_request(request, trials[best.name])
    result = export_result(trial_request)
    assert result.hf_dir is not None, "what is exported has a folder"
    chosen = {"trial": best.name, "loss": best.loss, "model": str(result.hf_dir.relative_to(context.folder.root))}
    write_json(context.folder.sweep / SWEEP_CHOICE_NAME, chosen)
    tracker.log_artifact(context.folder.sweep / SWEEP_CHOICE_NAME)
    return result.hf_dir


def note_results(context: RunContext, tracker: Tracker, records: Sequence[TrialRecord]) -> None:
    """Writes the results, and puts them and the best one's numbers into the lineage."""
    values = [record.model_dump(mode="json") for record in records]
    write_json(context.folder.sweep / SWEEP_RESULTS_NAME, values)
    tracker.log_artifact(context.folder.sweep / SWEEP_RESULTS_NAME)
    context.tracker.set_tags({NOTE_TAG: render_sweep(values)})
    context.tracker.log_metrics(list_trial_results(values[0]), step=records[0].step)


def print_results(records: Sequence[TrialRecord]) -> None:
    """Prints the trials, best first."""
    metric = "validation loss"
    texts = list(dict.fromkeys(name for record in records for name in record.text_losses))
    table = Table(title="Sweep, best first")
    for heading in ("trial", "steps", metric, *texts, "training loss", "FLOPs of full", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "trial" else "right")
    for item in records:
        steps = f"{item.step} of {item.max_steps}" if item.was_stopped else str(item.step)
        table.add_row(
            item.name,
            steps,
            _show(item.validation_loss, ".4f"),
            *(_show(item.text_losses.get(name), ".4f") for name in texts),
            _show(item.train_loss, ".4f"),
            f"{item.flops_share:.1%}",
            _show(item.tokens_per_s, ",.0f"),
        )
    Console(width=120).print(table)


def _show(value: float | None, shape: str) -> str:
    return "-" if value is None else format(value, shape)
