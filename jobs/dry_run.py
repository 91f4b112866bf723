"""`--dry-run`: what a run would do and cost, from config files alone; no weights, no GPU, no cluster."""

from __future__ import annotations

from pathlib import Path

import psutil

from jobs.model_options import find_base, revision_of, trusts_remote_code
from jobs.run_folder import RunFolder
from layerplan.config.load import dump_config
from layerplan.config.model import ScratchModelConfig
from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig, PlanOptions
from layerplan.config.run import RunConfig
from layerplan.corpus.joining import read_joining
from layerplan.errors import ModelError
from layerplan.models.files import find_tokenizer_file, load_hf_config
from layerplan.models.scratch_config import make_hf_config
from layerplan.models.tokenizer_facts import describe_tokenizer
from layerplan.plan.communication import predict_communication
from layerplan.plan.cost import ASSUMED_FLOPS_PER_S, GIB, PlanCost, explain_cost, predict_cost, render_cost_table
from layerplan.plan.decide import PlanContext, resolve_plan, wants_profile
from layerplan.plan.explain import explain_changes, render_layer_map
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.plan.memory import choose_placements
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan, make_plan
from layerplan.train.request import load_result

ASSUMED_GPU_BYTES = 139 * GIB
"""Memory of one H200."""


def print_dry_run(config: RunConfig) -> None:
    """Prints the resolved config, the plan's layer map and its predicted cost.

    Raises:
        LayerplanError: When model, plan or profile do not fit together.
    """
    print(dump_config(config))
    config = config.model_copy(update={"train": config.train.assume_dtype()})
    shape, model_type = _shape(config)
    model = ModelIdentity(name=_model_name(config), model_type=model_type, num_layers=shape.num_layers)
    plan, note = _plan(config, model, shape)
    print(f"model  {model.name}: {shape.num_layers} layers, {shape.total_params:,} parameters{_active(shape)}")
    print("text   " + "\n       ".join(_describe_text(config)))
    print(f"plan   {plan.plan_type}: {note}")
    print(f"       {render_layer_map(plan)}")
    print("".join(f"       {line}\n" for line in explain_changes(plan)))
    costs = _compare(config, plan, model, shape)
    print(render_cost_table({"full": costs["full"], **costs}))
    print(f"\nwhy    {explain_cost(plan, shape, costs['this plan'], costs['full'])}")
    _print_totals(config, plan, shape, costs["this plan"])


def _shape(config: RunConfig) -> tuple[ModelShape, str]:
    """Sizes and type of the model; one that is made on the spot need not be built to be known."""
    if isinstance(config.model, ScratchModelConfig):
        values = make_hf_config(config.model, vocab_size=config.model.vocab_size)
        return ModelShape.from_hf_config(values), str(values["model_type"])
    from layerplan.models.model_sizes import load_model_shape

    name, revision = find_base(config), revision_of(config)
    shape = load_model_shape(name, revision=revision, trust_remote_code=trusts_remote_code(config))
    return shape, str(load_hf_config(name, revision=revision)["model_type"])


def _describe_text(config: RunConfig) -> list[str]:
    """What the model's tokenizer is, and how documents are joined."""
    if isinstance(config.model, ScratchModelConfig):
        return ["tokenizer to be trained by the run"]
    try:
        joining = read_joining(config.corpus, find_tokenizer_file(find_base(config), revision=revision_of(config)))
    except ModelError as error:
        return [f"not known yet: {error}"]
    return [f"documents are {joining}", *describe_tokenizer(joining.facts)]


def _model_name(config: RunConfig) -> str:
    return "scratch" if isinstance(config.model, ScratchModelConfig) else Path(find_base(config)).name


def _plan(config: RunConfig, model: ModelIdentity, shape: ModelShape) -> tuple[FreezePlan, str]:
    """The plan itself, or a stand-in at the middle when only a measurement can decide."""
    folder = RunFolder(Path(config.storage_path).expanduser().resolve() / config.name)
    profile = LayerProfile.load(folder.profile) if folder.profile.exists() else None
    if profile is not None or not wants_profile(config.plan):
        plan = resolve_plan(config.plan, PlanContext(model, shape, config.train, config.corpus.seq_len, profile))
        return plan, plan.reason
    options = {name: getattr(config.plan, name) for name in PlanOptions.model_fields if hasattr(config.plan, name)}
    freezes_shallow = config.plan.type == "semantic" or getattr(config.plan, "freeze", "deep") == "shallow"
    stand_in = FreezeShallowPlanConfig if freezes_shallow else FreezeDeepPlanConfig
    plan = make_plan(stand_in(boundary=max(1, shape.num_layers // 2), **options), model=model, shape=shape)
    return plan, f"`{config.plan.type}` is decided by tracing; shown at the middle boundary meanwhile"


def _active(shape: ModelShape) -> str:
    return f", {shape.active_params:,} at work for a token" if shape.active_params < shape.total_params else ""


def _compare(config: RunConfig, plan: FreezePlan, model: ModelIdentity, shape: ModelShape) -> dict[str, PlanCost]:
    middle = max(1, shape.num_layers // 2)
    plans = {
        "full": make_full_plan(model, shape),
        "this plan": plan,
        "freeze_deep 1/2": make_plan(FreezeDeepPlanConfig(boundary=middle), model=model, shape=shape),
        "freeze_shallow 1/2": make_plan(FreezeShallowPlanConfig(boundary=middle), model=model, shape=shape),
    }
    return {name: predict_cost(item, shape, seq_len=config.corpus.seq_len) for name, item in plans.items()}


def _print_totals(config: RunConfig, plan: FreezePlan, shape: ModelShape, cost: PlanCost) -> None:
    train, seq_len = config.train, config.corpus.seq_len
    tokens = train.max_steps * train.global_batch_size * seq_len
    flops = tokens * cost.total_flops + train.max_steps * cost.optimizer_flops_per_step
    rate, source = _find_rate(config)
    hours = flops / (train.num_workers * rate) / 3600
    available = ASSUMED_GPU_BYTES if train.use_gpu else psutil.virtual_memory().available / train.num_workers
    chosen = choose_placements(
        plan,
        shape,
        train,
        seq_len=seq_len,
        world_size=train.num_workers,
        device_type="cuda" if train.use_gpu else "cpu",
        available_bytes=available,
    )
    placement, memory = chosen.placement, chosen.estimate
    phase = plan.at_step(chosen.start_step)
    sent = predict_communication(phase, shape, train, placement, world_size=train.num_workers)
    estimated = "\nnote   FLOPs and activations of this model are estimated from its sizes; parameters are counted"
    approximate = "" if shape.is_exact else estimated
    print(f"tokens {tokens:,} in {train.max_steps:,} steps of {train.global_batch_size} x {seq_len:,}")
    print(f"FLOPs  {flops:.3g}; about {hours:.2g} hours on {train.num_workers} x {source}")
    print(
        f"memory {memory.total / GIB:.2f} GiB of {available / GIB:.0f} per worker: parameters {memory.parameters / GIB:.2f},"
        f" activations {memory.activations / GIB:.2f}, loss {memory.loss / GIB:.2f}, the rest {memory.baseline / GIB:.2f}"
    )
    print(
        f"       parallelism {placement.parallelism}, {len(placement.checkpointed_layers)} layers recomputed; each worker"
        f" sends {sent.total / GIB:.2f} GiB per step ({sent.reduced / GIB:.2f} gradients)"
    )
    if plan.phases:
        print(
            f"       of the phase from step {chosen.start_step}, the largest; each worker also holds"
            f" {chosen.parked_bytes / GIB:.2f} GiB in CPU memory of what other phases train"
        )
    print(f"disk   {cost.checkpoint_bytes / GIB:.2f} GiB per checkpoint, {train.keep_checkpoints} kept{approximate}")


def _find_rate(config: RunConfig) -> tuple[float, str]:
    """FLOP/s of one worker and where it is from: measured by a finished run of this name, or assumed."""
    folder = RunFolder(Path(config.storage_path).expanduser().resolve() / config.name)
    finished = load_result(folder.root)
    if finished is not None and finished.tokens_per_s > 0 and folder.plan.exists():
        plan = FreezePlan.load(folder.plan)
        cost = PlanCost.model_validate(plan.predicted_cost["plan"])
        rate = finished.tokens_per_s * cost.total_flops / config.train.num_workers
        return rate, f"workers at {rate / 1e9:,.1f} GFLOP/s (measured by this run)"
    device = "GPU at 50 % of an H200" if config.train.use_gpu else "CPU core at 50 GFLOP/s"
    return ASSUMED_FLOPS_PER_S[config.train.use_gpu], f"{device} (assumed)"
