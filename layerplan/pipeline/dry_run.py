"""`--dry-run`: what a run would do and cost, from config files alone; no weights, no GPU, no cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import psutil

from layerplan.config.load import dump_config
from layerplan.config.model import ScratchModelConfig
from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig, LayerPlanOptions
from layerplan.config.run import RunConfig
from layerplan.config.stitch import StitchedModelConfig
from layerplan.config.train import TrainConfig
from layerplan.corpus.joining import read_joining
from layerplan.errors import ModelError
from layerplan.models.files import is_at_hand
from layerplan.models.ref import ModelRef
from layerplan.models.tokenizer_facts import describe_tokenizer
from layerplan.pipeline.base_facts import describe_base, describe_for_plan
from layerplan.pipeline.model_options import find_base
from layerplan.pipeline.predicted_settings import predict_settings
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.pipeline.texts import iter_corpus_sources, print_faults, print_source, print_texts_here
from layerplan.plan.attention import CAUSAL, OWN
from layerplan.plan.communication import predict_communication
from layerplan.plan.cost import ASSUMED_FLOPS_PER_S, GIB, explain_cost, predict_cost, render_cost_table
from layerplan.plan.decide import check_plan, list_measurements, resolve_plan, wants_profile
from layerplan.plan.explain import explain_changes, render_layer_map
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.host_memory import estimate_host_memory
from layerplan.plan.layer_measurement import LayerMeasurements
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.plan.memory import choose_placements, explain_shortage
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.plan_cost import PlanCost
from layerplan.plan.policies import make_full_plan, make_plan
from layerplan.storage.mirror import fetch_file
from layerplan.train.request import load_result

_ATTENTION_NAMES = {CAUSAL: "sdpa", OWN: "eager"}
ASSUMED_GPU_BYTES = 139 * GIB
"""Memory of one H200."""


def print_dry_run(config: RunConfig) -> None:
    """Prints the resolved config, the plan's layer map and its predicted cost.

    Raises:
        LayerplanError: When model, plan, rows or profile do not fit together.
    """
    print(dump_config(config))
    config = config.model_copy(update={"train": _expect_dtype(config)})
    model, shape = describe_model(config)
    shape.check_seq_len(config.corpus.seq_len)
    plan, note = find_plan(config, model, shape)
    print("text   " + "\n       ".join(_describe_text(config)))
    print(f"plan   {plan.plan_type}: {note}")
    print(f"       {render_layer_map(plan)}")
    print("".join(f"       {line}\n" for line in explain_changes(plan)))
    faults = print_texts_here(config)
    costs = _compare(config, plan, model, shape)
    print(render_cost_table({"full": costs["full"], **costs}))
    print(f"\nwhy    {explain_cost(plan, shape, costs['this plan'], costs['full'])}")
    _print_totals(config, plan, shape, costs["this plan"])
    print_faults(faults)  # below the numbers, which are of use where the texts are not


def print_trace_dry_run(config: RunConfig) -> None:
    """Prints the resolved config, the model and what it would be asked.

    Raises:
        LayerplanError: When the model or the probes cannot be read.
    """
    print(dump_config(config))
    describe_model(config)
    print_probes(config)
    print("writes layer_profile.json, freeze_plan.json and report.html; trains nothing")


def print_probes(config: RunConfig) -> None:
    """What the tracer would ask."""
    from layerplan.tracer.probes import collect_probes

    groups = Counter(probe.group for probe in collect_probes(config.trace))
    print(
        f"probes {groups.total():,} in {len(groups)} groups ({config.trace.probes}), {config.trace.num_actors} processes"
    )


def print_corpus_dry_run(config: RunConfig) -> None:
    """Prints the resolved config, what joins documents, and what there is to read of each source.

    Raises:
        LayerplanError: When a source or the tokenizer cannot be read.
    """
    print(dump_config(config))
    print("text   " + "\n       ".join(_describe_text(config)))
    print(f"rows   of {config.corpus.seq_len:,} tokens")
    for name, source in iter_corpus_sources(config):
        print_source(name, source)


def _expect_dtype(config: RunConfig) -> TrainConfig:
    """The training section with the compute dtype that a run of this name has measured, or that can be told without."""
    path = locate_run_folder(config).compute_dtype
    fetch_file(path)
    if config.train.compute_dtype != "auto" or config.train.use_gpu or not path.exists():
        return config.train.assume_dtype()
    from layerplan.train.compute_dtype import settle_dtype

    return settle_dtype(config.train, path)[0]


def describe_model(config: RunConfig) -> tuple[ModelIdentity, ModelShape]:
    """Prints which model it is, and gives its identity and sizes."""
    model, shape = describe_base(config, from_published=True)
    print(f"model  {model.name}: {shape.num_layers} layers, {shape.total_params:,} parameters{_active(shape)}")
    return model, shape


def count_hours(flops: float, config: RunConfig, rate: float) -> float:
    """Hours of a number of FLOPs on all workers of a run, each at `rate` FLOP/s."""
    return flops / (config.train.most_workers * rate) / 3600


def _describe_text(config: RunConfig) -> list[str]:
    """What the model's tokenizer is, and how documents are joined."""
    if isinstance(config.model, ScratchModelConfig):
        return ["tokenizer to be trained by the run"]
    model = _find_tokenizer_home(config)
    if not is_at_hand(model.name, "tokenizer.json", revision=model.revision):
        return [f"not known yet: the tokenizer of {model} is not on this machine; a run fetches it"]
    try:
        joining = read_joining(config.corpus, model.tokenizer_file())
    except ModelError as error:
        return [f"not known yet: {error}"]
    return [f"documents are {joining}", *describe_tokenizer(joining.facts)]


def _find_tokenizer_home(config: RunConfig) -> ModelRef:
    """The model whose tokenizer the run has."""
    if isinstance(config.model, StitchedModelConfig):
        donor = config.model.donors[config.model.first_donor]
        return ModelRef(donor.name, donor.revision, donor.trust_remote_code)
    return find_base(config)


def find_plan(config: RunConfig, model: ModelIdentity, shape: ModelShape) -> tuple[FreezePlan, str]:
    """The plan itself, or a stand-in at the middle when only a measurement can decide.

    Raises:
        PlanError: When it cannot be made for the model, or is a file that was made for another.
    """
    folder = locate_run_folder(config)
    fetch_file(folder.profile)
    profile = LayerProfile.load(folder.profile) if folder.profile.exists() else None
    fetch_file(folder.measurements)
    measurements = LayerMeasurements.load(folder.measurements) if folder.measurements.exists() else None
    lacks_measurements = measurements is None and list_measurements(config.plan)
    known = describe_for_plan(config, model, shape, from_published=True)
    if not lacks_measurements and (profile is not None or not wants_profile(config.plan)):
        plan = resolve_plan(config.plan, replace(known, profile=profile, measurements=measurements))
        return plan, plan.reason
    check_plan(config.plan, known)
    options = {name: getattr(config.plan, name) for name in LayerPlanOptions.model_fields if hasattr(config.plan, name)}
    freezes_shallow = config.plan.type == "semantic" or getattr(config.plan, "freeze", "deep") == "shallow"
    stand_in = FreezeShallowPlanConfig if freezes_shallow else FreezeDeepPlanConfig
    plan = make_plan(stand_in(boundary=max(1, shape.num_layers // 2), **options), model=model, shape=shape)
    how = "measuring" if lacks_measurements else "tracing"
    return plan, f"`{config.plan.type}` is decided by {how}; shown at the middle boundary meanwhile"


def _active(shape: ModelShape) -> str:
    return f", {shape.active_params:,} at work for a token" if shape.active_params < shape.total_params else ""


def _compare(config: RunConfig, plan: FreezePlan, model: ModelIdentity, shape: ModelShape) -> dict[str, PlanCost]:
    plans = list_beside(plan, model, shape)
    return {name: predict_cost(item, shape, seq_len=config.corpus.seq_len) for name, item in plans.items()}


def list_beside(plan: FreezePlan, model: ModelIdentity, shape: ModelShape) -> dict[str, FreezePlan]:
    """A plan and those it is shown beside, by name."""
    middle = max(1, shape.num_layers // 2)
    return {
        "full": make_full_plan(model, shape),
        "this plan": plan,
        "freeze_deep 1/2": make_plan(FreezeDeepPlanConfig(boundary=middle), model=model, shape=shape),
        "freeze_shallow 1/2": make_plan(FreezeShallowPlanConfig(boundary=middle), model=model, shape=shape),
    }


def _print_totals(config: RunConfig, plan: FreezePlan, shape: ModelShape, cost: PlanCost) -> None:
    train, seq_len = config.train, config.corpus.seq_len
    tokens = train.max_steps * train.global_batch_size * seq_len
    rate, source = find_rate(config)
    available = ASSUMED_GPU_BYTES if train.use_gpu else psutil.virtual_memory().available / train.most_workers
    device_type = "cuda" if train.use_gpu else "cpu"
    place: dict[str, Any] = {"seq_len": seq_len, "world_size": train.fewest_workers, "device_type": device_type}
    place |= {"available_bytes": available}
    train, attention, settings = predict_settings(config, plan, shape, cost, flops_per_s=rate, **place)
    chosen = choose_placements(plan, shape, train, attention=attention, **place)
    placement, memory = chosen.placement, chosen.estimate
    phase = plan.at_step(chosen.start_step)
    sent = predict_communication(phase, shape, train, placement, world_size=train.fewest_workers)
    again = placement.count_recomputed(cost.forward_flops, shape.num_layers)
    flops = tokens * (cost.total_flops + again) + train.max_steps * cost.optimizer_flops_per_step
    hours = count_hours(flops, config, rate)
    estimated = "\nnote   FLOPs and activations of this model are estimated from its sizes; parameters are counted"
    approximate = "" if shape.is_exact else estimated
    print(f"tokens {tokens:,} in {train.max_steps:,} steps of {train.global_batch_size} x {seq_len:,}")
    recomputed = f", {tokens * again / flops:.0%} of them recomputed" if again else ""
    print(f"FLOPs  {flops:.3g}{recomputed}; about {hours:.2g} hours on {train.most_workers} x {source}")
    print(
        f"memory {memory.total / GIB:.2f} GiB of {available / GIB:.0f} per worker: parameters {memory.parameters / GIB:.2f},"
        f" activations {memory.activations / GIB:.2f}, loss {memory.loss / GIB:.2f}, the rest {memory.baseline / GIB:.2f}"
    )
    print(
        f"       parallelism {placement.parallelism}, attention {_ATTENTION_NAMES.get(attention, attention)} (expected),"
        f" {len(placement.checkpointed_layers)} layers recomputed; each worker"
        f" sends {sent.total / GIB:.2f} GiB per step ({sent.reduced / GIB:.2f} gradients)"
    )
    unused = placement.explain_unused(train)
    for line in [unused, *settings] if unused else settings:
        print(f"       {line}")
    if memory.total > available:
        print(f"note   a run would stop on this machine. {explain_shortage(memory, available, train)}")
    host = estimate_host_memory(
        phase,
        shape,
        train,
        placement,
        world_size=train.fewest_workers,
        device_type=device_type,
    )
    print(
        f"host   {host.loading / GIB:.2f} GiB per worker until its first step, {host.shard / GIB:.2f} GiB of weights kept;"
        f" {host.export / GIB:.2f} GiB in the driver for the export"
    )
    if plan.phases:
        print(
            f"       of the phase from step {chosen.start_step}, the largest; each worker also holds"
            f" {chosen.parked_bytes / GIB:.2f} GiB in CPU memory of what other phases train"
        )
    print(f"disk   {cost.checkpoint_bytes / GIB:.2f} GiB per checkpoint, {train.keep_checkpoints} kept{approximate}")


def find_rate(config: RunConfig) -> tuple[float, str]:
    """FLOP/s of one worker and where it is from: measured by a finished run of this name, or assumed."""
    folder = locate_run_folder(config)
    for path in (folder.training, folder.plan):
        fetch_file(path)
    finished = load_result(folder.root)
    if finished is not None and finished.tokens_per_s > 0 and folder.plan.exists():
        predicted = FreezePlan.load(folder.plan).predicted_cost
        if predicted is not None:
            workers = finished.mean_workers if finished.worlds else config.train.most_workers
            rate = finished.tokens_per_s * predicted.plan.total_flops / workers
            return rate, f"workers at {rate / 1e9:,.1f} GFLOP/s (measured by this run)"
    device = "GPU at 50 % of an H200" if config.train.use_gpu else "CPU core at 50 GFLOP/s"
    return ASSUMED_FLOPS_PER_S[config.train.use_gpu], f"{device} (assumed)"
