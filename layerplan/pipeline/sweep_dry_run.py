"""`layerplan sweep --dry-run`: the trials in the order of the search, with their FLOPs and hours; nothing is started."""

from __future__ import annotations

from collections.abc import Sequence

from layerplan.config.load import dump_config
from layerplan.config.run import RunConfig
from layerplan.config.search import OptunaSearchConfig, ProfileSearchConfig, RandomSearchConfig
from layerplan.config.sweep import SweepConfig
from layerplan.pipeline.candidates import Candidate, make_candidates
from layerplan.pipeline.dry_run import count_hours, describe_model, find_rate
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.pipeline.sweep_checks import check_metric, list_unused_scoring
from layerplan.pipeline.sweep_rating import find_rating
from layerplan.plan.cost import predict_cost, render_cost_table
from layerplan.plan.policies import make_full_plan
from layerplan.sweep.choosers import draw_points, order_points


def print_sweep_dry_run(config: RunConfig, sweep: SweepConfig) -> None:
    """Prints the resolved config and every trial with what it trains, costs and takes.

    Raises:
        LayerplanError: When the model cannot be read, a boundary does not fit it, or no trial would report the metric.
    """
    print(dump_config(config))
    check_metric(config, sweep)
    model, shape = describe_model(config)
    space = make_candidates(config, sweep, model, shape)
    trials, note = _put_in_order(config, sweep, space)
    seq_len = config.corpus.seq_len
    full = predict_cost(make_full_plan(model, shape), shape, seq_len=seq_len)
    distinct = {each.plan.sha256: each for each in reversed(trials)}
    costs = {each.point.name: each.cost.plan for each in trials if distinct[each.plan.sha256] is each}
    print(render_cost_table({"full": full, **costs}))
    _print_trials(config, sweep, trials, len(space), note)
    for line in list_unused_scoring(config):
        print(f"note   {line}")


def _put_in_order(config: RunConfig, sweep: SweepConfig, space: Sequence[Candidate]) -> tuple[list[Candidate], str]:
    """The trials as the search goes through them, as far as that is known, and what is to be said of it."""
    search, points, by_name = sweep.search, [each.point for each in space], {each.point.name: each for each in space}
    if isinstance(search, RandomSearchConfig):
        drawn = [by_name[point.name] for point in draw_points(points, search)]
        return drawn, f"{len(drawn)} of {len(space)} drawn with seed {search.seed}"
    if isinstance(search, OptunaSearchConfig):
        return list(space), f"at most {min(search.num_trials, len(space))} of these {len(space)}, as Optuna suggests"
    if not isinstance(search, ProfileSearchConfig):
        return list(space), ""
    rate = find_rating(locate_run_folder(config), search)
    if rate is None:
        return list(space), f"in the order of `{search.by}`, which is not measured yet, as long as they may still win"
    ordered = [by_name[point.name] for point in order_points(points, rate)]
    return ordered, f"in the order of `{search.by}`, as long as they may still win"


def _print_trials(
    config: RunConfig, sweep: SweepConfig, trials: Sequence[Candidate], num_points: int, note: str
) -> None:
    tokens_per_step = config.train.global_batch_size * config.corpus.seq_len
    rate, source = find_rate(config)
    each = f"{sweep.max_steps * tokens_per_step:,} tokens in {sweep.max_steps:,} steps"
    if sweep.equal == "flops":
        each = f"the FLOPs of training everything for {each}"
    print(f"\ntrials {len(trials)}, each {each}" + (f"; {note}" if note else ""))
    for trial in trials:
        hours = count_hours(trial.flops, config, rate)
        steps = f"{trial.steps:,} steps, " if sweep.equal == "flops" else ""
        print(f"       {trial.point.name}: {steps}{trial.flops:.3g} FLOPs, about {hours:.2g} hours")
    counted = sorted((trial.flops for trial in trials), reverse=True)
    if isinstance(sweep.search, OptunaSearchConfig):
        counted = counted[: sweep.search.num_trials]
    most = "at most " if isinstance(sweep.search, OptunaSearchConfig | ProfileSearchConfig) else ""
    early = ", fewer where trials are stopped early" if sweep.scheduler == "asha" else ""
    at_once = {1: "", "auto": ", as many at once as there is room for"}.get(
        sweep.max_concurrent_trials, f", {sweep.max_concurrent_trials} at once"
    )
    total = sum(counted)
    print(
        f"FLOPs  {most}{total:.3g} in all{early}; about {count_hours(total, config, rate):.2g} hours one by one{at_once} on"
    )
    print(f"       {config.train.most_workers} x {source}")
