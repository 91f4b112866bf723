"""A plan in words: `freeze_plan.md`, and the layer map printed on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from layerplan.plan.boundary import compute_alignment_scores
from layerplan.plan.boundary_choice import SENSITIVITIES, BoundaryChoice, choose_boundary, get_sensitivity
from layerplan.plan.budget import render_pareto
from layerplan.plan.describe import (
    PAIR_HEADINGS,
    describe_certainty,
    describe_measurement,
    describe_sensitivities,
    list_pairs,
)
from layerplan.plan.freeze_plan import FreezePlan, PlanPhase
from layerplan.plan.layer_profile import LayerProfile
from layerplan.plan.markdown import as_text
from layerplan.plan.plan_cost import PredictedCost

TRAINS, FROZEN, PARTLY = "■", "□", "◧"


def render_layer_map(plan: FreezePlan) -> str:
    """One line per plan: which layers train, from the embeddings to the head."""
    ends = {True: TRAINS, False: FROZEN}
    num_partial = len(plan.trainable_modules)
    partly = f" {PARTLY} in part," if num_partial else ""
    how_many = f", {num_partial} of them in part" if num_partial else ""
    return (
        f"embed {ends[plan.train_embeddings]}  layers {render_cells(plan)}  norm {ends[plan.train_final_norm]}"
        f"  head {ends[plan.train_lm_head]}   ({TRAINS} trains,{partly} {FROZEN} frozen;"
        f" {len(plan.trainable_layers)} of {plan.model.num_layers} layers train{how_many})"
    )


def render_cells(plan: FreezePlan) -> str:
    """One character per decoder layer."""
    partly, trained = plan.trainable_modules, set(plan.trainable_layers)
    marks = (
        PARTLY if layer in partly else TRAINS if layer in trained else FROZEN for layer in range(plan.model.num_layers)
    )
    return "".join(marks)


def list_module_layers(plan: FreezePlan) -> dict[str, list[int]]:
    """Layers in which a module trains beside frozen ones, by its name."""
    names = sorted({name for each in plan.trainable_modules.values() for name in each})
    return {name: [layer for layer, each in plan.trainable_modules.items() if name in each] for name in names}


def summarize_plan(plan: FreezePlan) -> list[str]:
    """The reason, the rule of an older plan, and the layer map, as lines of Markdown."""
    older = describe_older_rule(plan)
    return [plan.reason, "", *([older, ""] if older else []), "```", render_layer_map(plan), "```", ""]


def read_choice(plan: FreezePlan | None) -> BoundaryChoice | None:
    """What decided a plan's boundary; None when no measurement did, or one of before there were rules to choose from."""
    try:
        return BoundaryChoice.model_validate(plan.evidence["boundary"]) if plan is not None else None
    except (KeyError, ValidationError):
        return None


def describe_older_rule(plan: FreezePlan) -> str:
    """A sentence on the rule of a plan that was made from a measurement before it named its rule; else empty."""
    if "boundary" in plan.evidence or not {"best_boundary", "alignment_score"} & plan.evidence.keys():
        return ""
    return (
        "This plan was made under the first rule: the largest S, with a side that has no layer counted as 0, and without a"
        " test against noise."
    )


def explain_plan(plan: FreezePlan, profile: LayerProfile | None = None, cost_here: PredictedCost | None = None) -> str:
    """Renders the plan as Markdown: the decision, what was measured, and what it costs.

    Args:
        plan: The plan.
        profile: The measurement of the model.
        cost_here: The cost for the rows of the run at hand, when the plan is from elsewhere.
    """
    lines = [
        f"# Freeze plan `{plan.plan_type}` for {as_text(plan.model.name)}",
        "",
        *summarize_plan(plan),
        *_cost_lines(plan, cost_here),
        *_pareto_lines(plan),
        *_phase_lines(plan),
        *_module_lines(plan),
        *(_profile_lines(profile, read_choice(plan)) if profile is not None else []),
        "## Layer by layer",
        "",
        "| layer | state |"
        if profile is None
        else "| layer | state | task particle | relative sensitivity | absolute | S (boundary above), relative | absolute |",
        "|---|---|" if profile is None else "|---|---|---|---|---|---|---|",
        *_layer_lines(plan, profile),
        "",
        f"Embeddings {_state(plan.train_embeddings)}, final norm {_state(plan.train_final_norm)},"
        f" head {_state(plan.train_lm_head)} (tied: {plan.tied}).",
        "",
        f"sha256 `{plan.sha256}`",
    ]
    return "\n".join(lines) + "\n"


def _cost_lines(plan: FreezePlan, cost_here: PredictedCost | None) -> list[str]:
    if plan.predicted_cost is None:
        return []
    cost = plan.predicted_cost.plan
    lines = [
        "## Predicted cost",
        "",
        f"- trains {cost.trainable_params:,} of {cost.total_params:,} parameters"
        f" ({cost.trainable_params / cost.total_params:.1%})",
        f"- {describe_flops(plan.predicted_cost)}",
    ]
    if cost_here is not None and cost_here.seq_len != plan.predicted_cost.seq_len:
        lines.append(f"- in this run {describe_flops(cost_here)}")
    return [*lines, f"- backward enters layer {cost.first_gradient_layer} and above", ""]


def describe_flops(predicted: PredictedCost) -> str:
    """FLOPs per token, the row length they are for, and their share of training everything."""
    return (
        f"{predicted.plan.total_flops / 1e9:.3f} GFLOP per token in rows of {predicted.seq_len:,} tokens,"
        f" {predicted.flops_share:.1%} of training everything"
    )


def _pareto_lines(plan: FreezePlan) -> list[str]:
    if "pareto" not in plan.evidence:
        return []
    title = "Plans that no other one beats in score without costing more FLOPs:"
    return ["## What the limits allow", "", title, "", *render_pareto(plan.evidence["pareto"]), ""]


def _phase_lines(plan: FreezePlan) -> list[str]:
    if not plan.phases:
        return []
    lines = [
        "## Phases",
        "",
        "| from step | policy | layers that train | embeddings | norm | head |",
        "|---|---|---|---|---|---|",
    ]
    for phase in plan.phases:
        ends = (phase.train_embeddings, phase.train_final_norm, phase.train_lm_head)
        lines.append(
            f"| {phase.start_step} | {phase.plan_type} | {_name_trained(phase)} | "
            + " | ".join(_state(end) for end in ends)
            + " |"
        )
    what = {"drop": "loses its moments", "keep": "keeps its moments for when it thaws"}[plan.optimizer_state]
    after = f"; the learning rate rises again over {plan.rewarm_steps} steps" if plan.rewarm_steps else ""
    return [*lines, "", f"A parameter that freezes at a change {what}{after}.", ""]


def _module_lines(plan: FreezePlan) -> list[str]:
    if not plan.trainable_modules:
        return []
    rows = [
        f"| `{name}` | {len(layers)} | {name_ranges(layers)} |" for name, layers in list_module_layers(plan).items()
    ]
    whole = [layer for layer in plan.trainable_layers if layer not in plan.trainable_modules]
    rest = f"Layers {name_ranges(whole)} train whole." if whole else "No layer trains whole."
    head = ["## Modules", "", "| module | layers it trains in | which |", "|---|---:|---|"]
    return [*head, *rows, "", f"{rest} What a layer's modules leave stays frozen.", ""]


def explain_changes(plan: FreezePlan, limit: int = 8) -> list[str]:
    """One short line per phase, the first few of many."""
    lines = [
        f"step {phase.start_step}: layers {_name_trained(phase)} train"
        + "".join(f", {name}" for name in ("embeddings", "final_norm", "lm_head") if getattr(phase, f"train_{name}"))
        for phase in plan.phases
    ]
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more phases"]


def _name_trained(phase: PlanPhase) -> str:
    """Layers of a phase, and how many of them train in part."""
    partly = f" ({len(phase.trainable_modules)} in part)" if phase.trainable_modules else ""
    return name_ranges(phase.trainable_layers) + partly


def name_ranges(layers: Sequence[int]) -> str:
    """Layer indices as people write them: `0-3, 7`; `none` for none."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts) or "none"


def _profile_lines(profile: LayerProfile, choice: BoundaryChoice | None) -> list[str]:
    choice = choice or choose_boundary(profile)
    return [
        "## What was measured",
        "",
        *(f"- {line}" for line in describe_measurement(profile)),
        "",
        "## How sure it is",
        "",
        *(f"- {line}" for line in describe_certainty(profile, choice)),
        "",
        "## Relative and absolute sensitivity",
        "",
        *describe_sensitivities(profile),
        "",
        f"| {' | '.join(PAIR_HEADINGS)} |",
        "|---" * len(PAIR_HEADINGS) + "|",
        *(f"| {' | '.join(row)} |" for row in list_pairs(profile, choice.min_side)),
        "",
    ]


def _layer_lines(plan: FreezePlan, profile: LayerProfile | None) -> list[str]:
    if profile is None:
        return [f"| {layer} | {_describe_layer(plan, layer)} |" for layer in range(plan.model.num_layers)]
    columns = [profile.task_particle, *(get_sensitivity(profile, kind) for kind in SENSITIVITIES)]
    scores = [compute_alignment_scores(profile.task_particle, values) for values in columns[1:]]
    return [
        f"| {layer} | {_describe_layer(plan, layer)} | "
        + " | ".join(f"{values[layer]:.3f}" if layer < len(values) else "-" for values in columns)
        + " | "
        + " | ".join(f"{values[layer - 1]:+.3f}" if 0 < layer <= len(values) else "-" for values in scores)
        + " |"
        for layer in range(plan.model.num_layers)
    ]


def _describe_layer(plan: FreezePlan, layer: int) -> str:
    modules = plan.trainable_modules.get(layer)
    return _state(layer in plan.trainable_layers) if modules is None else f"in part: {', '.join(modules)}"


def _state(trains: bool) -> str:
    return "trains" if trains else "frozen"
