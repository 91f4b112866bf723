"""Plans as text: shown, compared and priced from files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from layerplan.config.plan import ExplicitPlanConfig, FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.errors import ConfigError, PlanError, first_line
from layerplan.models.ref import ModelRef
from layerplan.pipeline.model_options import find_model
from layerplan.plan.cost import explain_cost, predict_cost, render_cost_table
from layerplan.plan.explain import explain_plan, name_ranges, render_layer_map
from layerplan.plan.exports import export_names, read_rule
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile, ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import DEFAULT_SEQ_LEN, make_full_plan, make_plan, seal_with_cost
from layerplan.run_folder import PLAN_NAME, PROFILE_NAME

ENDS = ("train_embeddings", "train_final_norm", "train_lm_head", "tied")


def read_plan(path: str) -> FreezePlan:
    """The plan of a file, or of the folder of a run or an export.

    Raises:
        PlanError: When there is none, or it was changed after it was made.
    """
    place = Path(path).expanduser()
    return FreezePlan.load(place / PLAN_NAME if place.is_dir() else place)


def print_plan(path: str) -> None:
    """Prints a plan in words, with the measurement beside it where there is one."""
    place = Path(path).expanduser()
    profile = place / PROFILE_NAME if place.is_dir() else place.with_name(PROFILE_NAME)
    plan = read_plan(path)
    print(explain_plan(plan, LayerProfile.load(profile) if profile.exists() else None))


def print_difference(first: str, second: str) -> None:
    """Prints two plans' maps and what one trains and the other does not.

    Raises:
        PlanError: When they are for models of different depth.
    """
    one, two = read_plan(first), read_plan(second)
    if one.model.num_layers != two.model.num_layers:
        raise PlanError(
            f"{first} and {second}: plans for {one.model.num_layers} and {two.model.num_layers} layers, which nothing compares"
        )
    for path, plan in ((first, one), (second, two)):
        print(f"{plan.sha256[:12]}  {render_layer_map(plan)}  {plan.plan_type}, {path}")
    if one.sha256 == two.sha256:
        print("the same plan")
        return
    for path, mine, theirs in ((first, one, two), (second, two, one)):
        layers = sorted(set(mine.trainable_layers) - set(theirs.trainable_layers))
        print(f"only {path} trains layers {name_ranges(layers)}" if layers else f"only {path} trains: no layer")
        for line in _list_more_modules(mine, theirs):
            print(f"only {path} trains {line}")
    for name in ENDS:
        if getattr(one, name) != getattr(two, name):
            print(f"{name}: {getattr(one, name)} in {first}, {getattr(two, name)} in {second}")
    if bool(one.phases) != bool(two.phases) or one.phases != two.phases:
        print("phases: they differ; the layers above are those of the first one")


def _list_more_modules(mine: FreezePlan, theirs: FreezePlan) -> list[str]:
    """What one plan trains of the layers that both train, and the other does not."""
    lines = []
    for layer in sorted(set(mine.trainable_layers) & set(theirs.trainable_layers)):
        some, others = mine.trainable_modules.get(layer), theirs.trainable_modules.get(layer)
        if others is not None and some is None:
            lines.append(f"all of layer {layer}")
        elif others is not None and some is not None and (more := [name for name in some if name not in others]):
            lines.append(f"{', '.join(more)} in layer {layer}")
    return lines


def print_prices(model: ModelRef, plans: Sequence[str], *, seq_len: int) -> None:
    """Prints the cost of usual plans and of the given ones, each beside full training.

    Raises:
        ConfigError: When the row length is not positive.
        LayerplanError: When model or plan cannot be read, or do not fit together.
    """
    if seq_len < 1:
        raise ConfigError(f"--seq-len {seq_len}: must be at least 1")
    from layerplan.models.published import load_shape_and_type

    model = _find(model)
    shape, model_type = load_shape_and_type(model)
    identity = ModelIdentity(name=Path(model.name).name, model_type=model_type, num_layers=shape.num_layers)
    chosen = {"full": make_full_plan(identity, shape), **_list_usual(identity, shape)}
    for path in plans:
        plan = read_plan(path)
        if plan.model.num_layers != shape.num_layers:
            raise PlanError(f"{path}: made for {plan.model.num_layers} layers, {model} has {shape.num_layers}")
        chosen[f"{plan.plan_type} {plan.sha256[:8]}"] = plan
    costs = {name: predict_cost(plan, shape, seq_len=seq_len) for name, plan in chosen.items()}
    print(
        f"{identity.name}: {shape.num_layers} layers, {shape.total_params:,} parameters, rows of {seq_len:,} tokens\n"
    )
    print(render_cost_table(costs))
    for name in list(costs)[1:]:
        print(f"\n{name}: {explain_cost(chosen[name], shape, costs[name], costs['full'])}", end="")
    print()


def print_export(path: str, tool: str, model: ModelRef) -> None:
    """Prints a plan as a tool's configuration.

    Raises:
        LayerplanError: When plan or model cannot be read, do not fit together, or the tool cannot say the plan.
    """
    from layerplan.models.parameter_names import build_unloaded, name_parameters

    print(export_names(name_parameters(build_unloaded(_find(model)), read_plan(path)), tool), end="")


def import_plan(path: str, tool: str, model: ModelRef, out: str) -> None:
    """Writes the plan that a tool's configuration is, and prints it.

    Raises:
        LayerplanError: When the file or the model cannot be read, or no plan says what the configuration does.
    """
    from layerplan.models.parameter_names import build_unloaded, find_selectors, name_parameters

    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise PlanError(f"{path}: a mapping of fields is expected")
    model = _find(model)
    built, shape = build_unloaded(model), model.shape()
    rule = read_rule(values, tool, num_layers=shape.num_layers)
    fields, modules = find_selectors(built, rule)
    plan = make_plan(ExplicitPlanConfig(**fields), model=model.identity(with_weights=False), shape=shape)
    if modules:
        plan = seal_with_cost(plan.model_copy(update={"trainable_modules": modules}), shape, DEFAULT_SEQ_LEN)
    for name in (names := name_parameters(built, plan)).all:
        if rule(name) != (name in names.trainable):
            raise PlanError(
                f"{path}: {'trains' if rule(name) else 'freezes'} {name}, which no plan does beside the rest"
            )
    plan.save(Path(out))
    print(explain_plan(plan, None))
    print(f"plan      {Path(out).resolve()} ({plan.sha256[:12]})")


def _find(model: ModelRef) -> ModelRef:
    """The same, a GGUF file converted."""
    return replace(model, name=find_model(model.name))


def _list_usual(model: ModelIdentity, shape: ModelShape) -> dict[str, FreezePlan]:
    middle = max(1, shape.num_layers // 2)
    return {
        "freeze_deep 1/2": make_plan(FreezeDeepPlanConfig(boundary=middle), model=model, shape=shape),
        "freeze_shallow 1/2": make_plan(FreezeShallowPlanConfig(boundary=middle), model=model, shape=shape),
    }
