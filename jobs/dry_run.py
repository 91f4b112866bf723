"""`--dry-run`: what a run would do and cost, from config files alone; no weights, no GPU, no cluster."""

from __future__ import annotations

from pathlib import Path

from jobs.run_folder import RunFolder
from jobs.stages import revision_of
from layerplan.config.load import dump_config
from layerplan.config.model import ScratchModelConfig
from layerplan.config.plan import FilePlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.config.run import RunConfig
from layerplan.models.files import load_hf_config
from layerplan.models.scratch import make_hf_config
from layerplan.plan.cost import GIB, PlanCost, explain_cost, predict_cost, render_cost_table
from layerplan.plan.explain import render_layer_map
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_full_plan, make_plan, needs_profile

ASSUMED_FLOPS_PER_S = {True: 790e12 * 0.5, False: 50e9}
"""Per worker: half of an H200's bf16 matrix rate, or one CPU core."""


def print_dry_run(config: RunConfig) -> None:
    """Prints the resolved config, the plan's layer map and its predicted cost.

    Raises:
        LayerplanError: When model, plan or profile do not fit together.
    """
    print(dump_config(config))
    values = _hf_config(config)
    shape = ModelShape.from_hf_config(values)
    model = ModelIdentity(name=_model_name(config), model_type=str(values["model_type"]), num_layers=shape.num_layers)
    plan, note = _plan(config, model, shape)
    print(f"model  {model.name}: {shape.num_layers} layers, {shape.total_params:,} parameters")
    print(f"plan   {plan.plan_type}: {note}")
    print(f"       {render_layer_map(plan)}\n")
    costs = _compare(config, plan, model, shape)
    print(render_cost_table({"full": costs["full"], **costs}))
    print(f"\nwhy    {explain_cost(plan, shape, costs['this plan'], costs['full'])}")
    _print_totals(config, costs["this plan"])


def _hf_config(config: RunConfig) -> dict[str, object]:
    if isinstance(config.model, ScratchModelConfig):
        return make_hf_config(config.model, vocab_size=config.model.vocab_size)
    return load_hf_config(config.model.name, revision=revision_of(config))


def _model_name(config: RunConfig) -> str:
    return "scratch" if isinstance(config.model, ScratchModelConfig) else Path(config.model.name).name


def _plan(config: RunConfig, model: ModelIdentity, shape: ModelShape) -> tuple[FreezePlan, str]:
    """The plan itself, or a stand-in at the middle when only a measurement can decide."""
    if isinstance(config.plan, FilePlanConfig):
        plan = FreezePlan.load(Path(config.plan.path).expanduser())
        return plan, plan.reason
    folder = RunFolder(Path(config.storage_path).expanduser().resolve() / config.name)
    profile = LayerProfile.load(folder.profile) if folder.profile.exists() else None
    if profile is not None or not needs_profile(config.plan):
        plan = make_plan(config.plan, model=model, shape=shape, profile=profile)
        return plan, plan.reason
    options = {
        name: getattr(config.plan, name) for name in ("train_embeddings", "train_final_norm", "train_lm_head", "tied")
    }
    freezes_shallow = config.plan.type == "semantic" or getattr(config.plan, "freeze", "deep") == "shallow"
    stand_in = FreezeShallowPlanConfig if freezes_shallow else FreezeDeepPlanConfig
    plan = make_plan(stand_in(boundary=max(1, shape.num_layers // 2), **options), model=model, shape=shape)
    return plan, f"`{config.plan.type}` is decided by tracing; shown at the middle boundary meanwhile"


def _compare(config: RunConfig, plan: FreezePlan, model: ModelIdentity, shape: ModelShape) -> dict[str, PlanCost]:
    middle = max(1, shape.num_layers // 2)
    plans = {
        "full": make_full_plan(model, shape),
        "this plan": plan,
        "freeze_deep 1/2": make_plan(FreezeDeepPlanConfig(boundary=middle), model=model, shape=shape),
        "freeze_shallow 1/2": make_plan(FreezeShallowPlanConfig(boundary=middle), model=model, shape=shape),
    }
    return {name: predict_cost(item, shape, seq_len=config.corpus.seq_len) for name, item in plans.items()}


def _print_totals(config: RunConfig, cost: PlanCost) -> None:
    train = config.train
    tokens = train.max_steps * train.global_batch_size * config.corpus.seq_len
    flops = tokens * cost.total_flops
    hours = flops / (train.num_workers * ASSUMED_FLOPS_PER_S[train.use_gpu]) / 3600
    device = "GPU at 50 % of an H200" if train.use_gpu else "CPU core at 50 GFLOP/s"
    print(f"tokens {tokens:,} in {train.max_steps:,} steps of {train.global_batch_size} x {config.corpus.seq_len:,}")
    print(f"FLOPs  {flops:.3g}; about {hours:.2g} hours on {train.num_workers} x {device} (assumed)")
    print(f"memory {cost.weight_and_optimizer_bytes / GIB:.2f} GiB of weights, gradients and optimizer, unsharded")
    print(f"disk   {cost.checkpoint_bytes / GIB:.2f} GiB per checkpoint, {train.keep_checkpoints} kept")
