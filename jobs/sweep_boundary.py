"""Ray Tune over boundaries: one training run per candidate plan, nested in one lineage, a table at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.base_model import prepare_model
from jobs.checks import check_corpus, check_model
from jobs.dry_run import print_dry_run
from jobs.entry import build_parser, run_job
from jobs.model_options import revision_of, trusts_remote_code
from jobs.run_folder import locate_run_folder
from jobs.session import open_run
from jobs.stages import RunContext, ask_loss, build_store, make_train_request, say, tracked, write_json
from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.config.run import RunConfig
from layerplan.config.sweep import SweepConfig
from layerplan.errors import ConfigError, PlanError
from layerplan.models.files import identify_model
from layerplan.models.model_sizes import load_model_shape
from layerplan.plan.boundary import check_boundary, compute_boundary
from layerplan.plan.policies import make_plan
from layerplan.sweep.objective import Trial
from layerplan.sweep.search import check_search, save_search
from layerplan.sweep.tuner import TrialResult, run_sweep
from layerplan.tracking.tracker import RunSinkFactory, Tracker

DEFAULT_SWEEP = SweepConfig(split_ratios=[1 / 3, 1 / 2, 2 / 3])


def sweep_boundary(config: RunConfig, args: argparse.Namespace) -> None:
    """Trains every candidate and prints them, best first."""
    if args.dry_run:
        print_dry_run(config)
        return
    for check in (check_model, check_corpus):
        check(config)
    sweep = config.sweep or DEFAULT_SWEEP
    check_search(sweep, locate_run_folder(config).sweep)
    with open_run(config) as context:
        model = prepare_model(context)
        recipe = ask_loss(context, model)
        store = build_store(context, model)
        with tracked(context, "sweep") as tracker:
            trials = make_trials(context, tracker, model, sweep)
            save_search(sweep, context.folder.sweep)
            request = make_train_request(context, model, trials[0].plan, store, None)
            train = config.train.model_copy(
                update={
                    "max_steps": sweep.max_steps,
                    "checkpoint_every_steps": min(config.train.checkpoint_every_steps, sweep.max_steps),
                    "validate_every_steps": min(config.train.validate_every_steps, sweep.max_steps),
                }
            )
            results = run_sweep(
                sweep, replace(request, run_dir=context.folder.sweep, config=train, recipe=recipe), trials
            )
            write_json(context.folder.sweep / "results.json", [vars(result) for result in results])
            tracker.log_artifact(context.folder.sweep / "results.json")
        print_results(results)


def make_trials(context: RunContext, tracker: Tracker, model_name: str, sweep: SweepConfig) -> list[Trial]:
    """One trial per distinct boundary, each with its plan saved and its nested run opened.

    Raises:
        ConfigError: When a boundary does not fit the model.
    """
    identity = identify_model(model_name, revision=revision_of(context.config))
    config = context.config
    shape = load_model_shape(model_name, revision=revision_of(config), trust_remote_code=trusts_remote_code(config))
    ratios, given = sweep.split_ratios or [], sweep.boundaries or []
    boundaries = sorted({*(compute_boundary(ratio, shape.num_layers) for ratio in ratios), *given})
    ends: dict[str, Any] = {
        name: getattr(context.config.plan, name, default)
        for name, default in (
            ("tied", None),
            ("train_embeddings", False),
            ("train_final_norm", False),
            ("train_lm_head", False),
        )
    }
    kind = FreezeDeepPlanConfig if sweep.freeze == "deep" else FreezeShallowPlanConfig
    trials = []
    for boundary in boundaries:
        try:
            check_boundary(boundary, shape.num_layers, "sweep.boundaries")
        except PlanError as error:
            raise ConfigError(str(error)) from None
        name = f"boundary_{boundary:02d}"
        plan = make_plan(
            kind(boundary=boundary, **ends), model=identity, shape=shape, seq_len=context.config.corpus.seq_len
        )
        plan.save(context.folder.sweep / name / "freeze_plan.json")
        child = tracker.child(f"sweep_{name}")
        child.log_params({"boundary": boundary, "plan_sha256": plan.sha256})
        child.log_artifact(context.folder.sweep / name / "freeze_plan.json")
        trials.append(Trial(name, plan, RunSinkFactory(context.folder.sweep / name / "metrics.jsonl", name, child)))
    say("sweep", f"{len(trials)} boundaries: {', '.join(map(str, boundaries))}")
    return trials


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


if __name__ == "__main__":
    sys.exit(run_job(sweep_boundary, build_parser("Sweep the boundary of a freeze plan with Ray Tune.")))
