"""A plan in words: `freeze_plan.md`, and the layer map printed on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from layerplan.plan.budget import render_pareto
from layerplan.plan.cost import PlanCost
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile

TRAINS, FROZEN = "■", "□"
RIGHT_ENOUGH = 0.5
"""Share of right answers below which a profile is called noise."""
SURE_ENOUGH = 0.5
"""Share of bootstrap resamples a boundary has to win to be called settled."""


def render_layer_map(plan: FreezePlan) -> str:
    """One line per plan: which layers train, from the embeddings to the head."""
    trained = set(plan.trainable_layers)
    cells = "".join(TRAINS if layer in trained else FROZEN for layer in range(plan.model.num_layers))
    ends = {True: TRAINS, False: FROZEN}
    return (
        f"embed {ends[plan.train_embeddings]}  layers {cells}  norm {ends[plan.train_final_norm]}"
        f"  head {ends[plan.train_lm_head]}   ({TRAINS} trains, {FROZEN} frozen;"
        f" {len(trained)} of {plan.model.num_layers} layers train)"
    )


def summarize_plan(plan: FreezePlan) -> list[str]:
    """The reason and the layer map, as lines of Markdown."""
    return [plan.reason, "", "```", render_layer_map(plan), "```", ""]


def explain_plan(plan: FreezePlan, profile: LayerProfile | None = None) -> str:
    """Renders the plan as Markdown: the decision, what was measured, and what it costs."""
    lines = [
        f"# Freeze plan `{plan.plan_type}` for {plan.model.name}",
        "",
        *summarize_plan(plan),
        *_cost_lines(plan),
        *_pareto_lines(plan),
        *_phase_lines(plan),
        *(_profile_lines(profile) if profile is not None else []),
        "## Layer by layer",
        "",
        "| layer | state |"
        if profile is None
        else "| layer | state | task particle | sensitivity | S (boundary above) |",
        "|---|---|" if profile is None else "|---|---|---|---|---|",
        *_layer_lines(plan, profile),
        "",
        f"Embeddings {_state(plan.train_embeddings)}, final norm {_state(plan.train_final_norm)},"
        f" head {_state(plan.train_lm_head)} (tied: {plan.tied}).",
        "",
        f"sha256 `{plan.sha256}`",
    ]
    return "\n".join(lines) + "\n"


def _cost_lines(plan: FreezePlan) -> list[str]:
    if not plan.predicted_cost:
        return []
    cost = PlanCost.model_validate(plan.predicted_cost["plan"])
    full = PlanCost.model_validate(plan.predicted_cost["full"])
    return [
        "## Predicted cost",
        "",
        f"- trains {cost.trainable_params:,} of {cost.total_params:,} parameters"
        f" ({cost.trainable_params / cost.total_params:.1%})",
        f"- {cost.total_flops / 1e9:.3f} GFLOP per token at {plan.predicted_cost['seq_len']:,} tokens,"
        f" {cost.total_flops / full.total_flops:.1%} of training everything",
        f"- backward enters layer {cost.first_gradient_layer} and above",
        "",
    ]


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
            f"| {phase.start_step} | {phase.plan_type} | {name_ranges(phase.trainable_layers)} | "
            + " | ".join(_state(end) for end in ends)
            + " |"
        )
    what = {"drop": "loses its moments", "keep": "keeps its moments for when it thaws"}[plan.optimizer_state]
    after = f"; the learning rate rises again over {plan.rewarm_steps} steps" if plan.rewarm_steps else ""
    return [*lines, "", f"A parameter that freezes at a change {what}{after}.", ""]


def explain_changes(plan: FreezePlan, limit: int = 8) -> list[str]:
    """One short line per phase, the first few of many."""
    lines = [
        f"step {phase.start_step}: layers {name_ranges(phase.trainable_layers)} train"
        + "".join(f", {name}" for name in ("embeddings", "final_norm", "lm_head") if getattr(phase, f"train_{name}"))
        for phase in plan.phases
    ]
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more phases"]


def name_ranges(layers: Sequence[int]) -> str:
    """Layer indices as people write them: `0-3, 7`; `none` for none."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts) or "none"


def describe_measurement(profile: LayerProfile) -> list[str]:
    """Sentences on what was measured: probes, answers, where the task happens, where the context stops to matter."""
    answered = sum(profile.answered_share.values()) / max(len(profile.answered_share), 1)
    lines = [
        f"{profile.num_probes} probes in {len(profile.groups)} groups; the model answers {answered:.0%} of them rightly"
        f" ({_extremes(profile.answered_share)})."
    ]
    if answered < RIGHT_ENOUGH:
        lines.append("A profile of wrong answers is noise; read the boundary as a guess.")
    start, end = profile.task_particle_interval
    theta = profile.options.get("task_particle_threshold", 0.5)
    where = f"layers {start} to {end - 1}" if end > start else "no layer"
    strongest = profile.task_particle_argmax
    lines.append(
        f"Task evidence moves by more than {theta:g} of itself in {where} (task particle), most in layer {strongest}"
        f" ({profile.task_particle[strongest]:.2f}{_interval(profile, 'task_particle', strongest)})."
    )
    sensitive = max(range(len(profile.layer_sensitivity)), key=lambda layer: profile.layer_sensitivity[layer])
    lines.append(
        f"Masking the context before layer 0 moves the answer by {profile.js[0]:.3f} nats of Jensen-Shannon divergence;"
        f" the effect changes most at layer {sensitive}, by {profile.layer_sensitivity[sensitive]:.2f} of itself"
        f"{_interval(profile, 'layer_sensitivity', sensitive)}."
    )
    for kind, values in profile.semantic.items():
        if kind == "cosine":
            lines.append(
                f"The state gets nearest to the right answer's meaning in layer {values.eof_layer} (SALF, cosine)."
            )
    return lines


def describe_certainty(profile: LayerProfile) -> list[str]:
    """Sentences on how sure the chosen boundary is."""
    best = profile.best_boundary
    lines = [
        f"The alignment score is highest at boundary {best}:"
        f" {profile.alignment_score[best - 1]:+.2f}{_interval(profile, 'alignment_score', best - 1)}."
    ]
    if profile.boundary_win_share:
        share = profile.boundary_win_share[best - 1]
        rivals = sorted(range(1, len(profile.boundary_win_share) + 1), key=lambda k: -profile.boundary_win_share[k - 1])
        rival = next((k for k in rivals if k != best and profile.boundary_win_share[k - 1] > 0), None)
        beside = f"; next is {rival} with {profile.boundary_win_share[rival - 1]:.0%}" if rival is not None else ""
        lines.append(f"It wins in {share:.0%} of bootstrap resamples of the probes{beside}.")
        if share < SURE_ENOUGH:
            lines.append(
                "The probes do not settle the boundary: treat it as one of several, and sweep it when you can."
            )
    for name, said in (("top_k", "another top-k support"), ("mask", "another mask")):
        values = profile.stability.get(name, {})
        if "boundary" in values:
            chosen, before = int(values["boundary"]), int(values["boundary"] - values["boundary_change"])
            same = "the same boundary" if chosen == before else f"boundary {chosen} in place of {before}"
            if chosen == before != best:
                same = f"boundary {chosen}, as the measurement does on these probes"
            count = int(values.get("num_probes", profile.num_probes))
            some = f" (tried on {count} of {profile.num_probes} probes)" if count < profile.num_probes else ""
            lines.append(
                f"With {said}{some}, sensitivity ranks layers alike with {values['sensitivity_correlation']:.2f}, and S"
                f" chooses {same}."
            )
    halves = profile.stability.get("halves", {})
    if "same_boundary_share" in halves:
        lines.append(
            f"Two random halves of the probes choose the same boundary in {halves['same_boundary_share']:.0%} of halvings"
            f" and differ by {halves['boundary_change']:.1f} layers on average."
        )
    return lines


def _extremes(shares: dict[str, float]) -> str:
    named = sorted(shares.items(), key=lambda item: item[1])
    (low, lowest), (high, highest) = named[0], named[-1]
    if lowest == highest:
        return f"{lowest:.0%} in every group"
    return f"from {lowest:.0%} in {low} to {highest:.0%} in {high}"


def _interval(profile: LayerProfile, name: str, index: int) -> str:
    intervals = profile.uncertainty.get(name, [])
    return f", 95 % interval {intervals[index].low:.2f} to {intervals[index].high:.2f}" if intervals else ""


def _profile_lines(profile: LayerProfile) -> list[str]:
    return [
        "## What was measured",
        "",
        *(f"- {line}" for line in describe_measurement(profile)),
        "",
        "## How sure it is",
        "",
        *(f"- {line}" for line in describe_certainty(profile)),
        "",
    ]


def _layer_lines(plan: FreezePlan, profile: LayerProfile | None) -> list[str]:
    trained = set(plan.trainable_layers)
    lines = []
    for layer in range(plan.model.num_layers):
        state = _state(layer in trained)
        if profile is None:
            lines.append(f"| {layer} | {state} |")
            continue
        sensitivity = f"{profile.layer_sensitivity[layer]:.3f}" if layer < len(profile.layer_sensitivity) else "-"
        score = f"{profile.alignment_score[layer - 1]:+.3f}" if layer > 0 else "-"
        lines.append(f"| {layer} | {state} | {profile.task_particle[layer]:.3f} | {sensitivity} | {score} |")
    return lines


def _state(trains: bool) -> str:
    return "trains" if trains else "frozen"
