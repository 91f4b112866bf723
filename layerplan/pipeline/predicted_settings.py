"""What a dry run says of settings that a run decides: micro-batch, compiling, attention, what is kept of a frozen prefix."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

from layerplan.config.run import RunConfig
from layerplan.config.train import TrainConfig
from layerplan.corpus.manifest import Manifest, resolve_store
from layerplan.errors import LayerplanError
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.plan.attention import expect_attention
from layerplan.plan.compiling import choose_compile
from layerplan.plan.cost import GIB
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.micro_batch import choose_micro_rows, settle_micro_rows
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.plan_cost import PlanCost
from layerplan.plan.prefix_cache import find_plan_fault, price_prefix
from layerplan.storage.mirror import fetch_file


class PredictedSettings(NamedTuple):
    """What a run is expected to decide."""

    train: TrainConfig
    """With micro-batch and compiling settled."""
    attention: str
    """As `expect_attention` names it."""
    lines: list[str]
    """What there is to say."""


def predict_settings(
    config: RunConfig, plan: FreezePlan, shape: ModelShape, cost: PlanCost, *, flops_per_s: float, **place: Any
) -> PredictedSettings:
    """What a run is expected to decide of its training section.

    Args:
        config: Of the run, its compute dtype settled.
        plan: What trains.
        shape: Sizes of the model.
        cost: Of the plan.
        flops_per_s: Of one worker.
        place: As for `choose_micro_rows`.
    """
    train, lines = config.train, list[str]()
    workers = place["world_size"]
    if train.compile == "auto":
        tokens = train.global_batch_size * config.corpus.seq_len / workers
        steps = train.max_steps / max(1, len(plan.phases))
        choice = choose_compile(train, flops_per_step=tokens * cost.total_flops, num_steps=steps)
        train = train.model_copy(update={"compile": choice.compiles})
        lines.append(str(choice))
    recipe = _expect_recipe(config)
    attention = expect_attention(train, seq_len=config.corpus.seq_len, device_type=place["device_type"], recipe=recipe)
    if train.micro_batch_size == "auto":
        train = settle_micro_rows(train, choose_micro_rows(plan, shape, train, attention=attention, **place))
        lines.append(
            f"micro-batch of {train.micro_rows} rows (auto: predicted; the run tries a step, and halves it where it must)"
        )
    if train.cache_prefix != "off":
        lines.append(f"prefix cache: {_describe_cache(config, plan, shape, workers, flops_per_s)}")
    return PredictedSettings(train, attention, lines)


def _expect_recipe(config: RunConfig) -> LossRecipe:
    """As a run of this name has found, else that documents share rows and any attention serves, as for most models."""
    path = locate_run_folder(config).self_test
    fetch_file(path)
    recipe = LossRecipe()
    if path.exists():
        recipe = LossRecipe.from_json(json.loads(path.read_text(encoding="utf-8"))["recipe"])
    return recipe if config.corpus.document_mask else replace(recipe, rows="whole")


def _describe_cache(config: RunConfig, plan: FreezePlan, shape: ModelShape, workers: int, flops_per_s: float) -> str:
    if fault := find_plan_fault(plan, shape.num_layers):
        return f"none, {fault}"
    options = {"seq_len": config.corpus.seq_len, "world_size": workers, "flops_per_s": flops_per_s}
    num_rows = _count_rows(config)
    if num_rows is None:
        row = price_prefix(plan, shape, config.train, num_rows=1, **options).num_bytes  # type: ignore[arg-type]
        most = config.train.max_steps * config.train.global_batch_size
        size = f"{row:,} bytes a row, {row * most / GIB:,.2f} GiB at most"
        return f"{size}; how many rows there are is known once the store is built"
    if config.train.max_steps * config.train.global_batch_size <= num_rows:
        return f"none, no row of the store's {num_rows:,} comes again"
    price = price_prefix(plan, shape, config.train, num_rows=num_rows, **options)  # type: ignore[arg-type]
    is_on = price.pays or config.train.cache_prefix == "on"
    return f"{price}" if is_on else f"none, it does not pay: {price}"


def _count_rows(config: RunConfig) -> int | None:
    """Of the store the config names, or the run has made."""
    try:
        named = config.corpus.store
        store = locate_run_folder(config).token_store if named is None else resolve_store(named)
        return Manifest.load(store).num_rows
    except (LayerplanError, OSError):
        return None
