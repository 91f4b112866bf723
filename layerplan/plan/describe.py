"""A measurement in words: what was measured, what it says about a boundary, and how sure that is."""

from __future__ import annotations

from layerplan.config.plan import DEFAULT_MIN_SIDE, BoundaryOptions
from layerplan.plan.boundary import RULES, compute_alignment_scores
from layerplan.plan.boundary_choice import (
    SENSITIVITIES,
    BoundaryChoice,
    choose_boundary,
    compute_vanished_share,
    explain_no_support,
    find_choice,
    get_sensitivity,
    measure_every_pair,
)
from layerplan.plan.holm import correct_holm
from layerplan.plan.layer_profile import ENOUGH_ANSWERS, LayerProfile
from layerplan.plan.permutation import SIGNIFICANT

PAIR_HEADINGS = ["sensitivity", "rule", "best boundary", "p", "p if all four are tried (Holm)"]


def describe_measurement(profile: LayerProfile) -> list[str]:
    """Sentences on what was measured: probes, answers, where the task happens, where the context stops to matter."""
    lines = [
        f"{profile.num_probes} probes in {len(profile.groups)} groups; the model answers"
        f" {get_answered_share(profile):.0%} of them rightly"
        f" ({_extremes(profile.answered_share)}).",
        *_describe_answers(profile),
    ]
    start, end = profile.task_particle_interval
    theta = profile.options.get("task_particle_threshold", 0.5)
    many = f"layers {start} to {end - 1}, the longest run of such layers"
    where = {0: "no layer", 1: f"layer {start}"}.get(max(0, end - start), many)
    strongest = profile.task_particle_argmax
    lines.append(
        f"Task evidence moves by more than {theta:g} of itself in {where} (task particle), most in layer {strongest}"
        f" ({profile.task_particle[strongest]:.2f}{_interval(profile, 'task_particle', strongest)})."
    )
    sensitive = max(range(len(profile.layer_sensitivity)), key=lambda layer: profile.layer_sensitivity[layer])
    lines.append(
        f"Masking the context before layer 0 moves the answer by {profile.js[0]:.3g} nats of Jensen-Shannon divergence;"
        f" the effect changes most at layer {sensitive}, by {profile.layer_sensitivity[sensitive]:.2f} of itself"
        f"{_interval(profile, 'layer_sensitivity', sensitive)}."
    )
    for kind, values in profile.semantic.items():
        if kind == "cosine":
            lines.append(
                f"The state gets nearest to the right answer's meaning in layer {values.eof_layer} (SALF, cosine)."
            )
    if profile.head_row_semantic:
        kinds = " and ".join(sorted(profile.head_row_semantic))
        lines.append(
            f"The profile is of layout {profile.schema_version}, whose {kinds} deviations were taken from the head's rows and"
            " not from the labels' semantic bases; they are not shown, and no plan uses them."
        )
    return lines


def describe_certainty(profile: LayerProfile, choice: BoundaryChoice | None = None) -> list[str]:
    """Sentences on the boundary: evidence over layers first, then stability over probes.

    Args:
        profile: The measurement.
        choice: What was made of it; under the default rule when left out.
    """
    choice = choice or choose_boundary(profile)
    lines = [*_describe_layout(profile), *_describe_evidence(choice)]
    lines.append(f"S at the paper's shares of shallow layers: {_name_ratio_scores(choice)}.")
    lines += _describe_probe_stability(profile, choice)
    for name, said in (("top_k", "another top-k support"), ("mask", "another mask")):
        values = profile.stability.get(name, {})
        if "boundary" in values:
            chosen, before = int(values["boundary"]), int(values["boundary"] - values["boundary_change"])
            same = f"boundary {chosen}, as before" if chosen == before else f"boundary {chosen} in place of {before}"
            count = int(values.get("num_probes", profile.num_probes))
            some = f" (tried on {count} of {profile.num_probes} probes)" if count < profile.num_probes else ""
            lines.append(
                f"With {said}{some}, sensitivity ranks layers alike with {values['sensitivity_correlation']:.2f}, and the"
                f" best is {same}."
            )
    halves = profile.stability.get("halves", {})
    if "same_boundary_share" in halves:
        lines.append(
            f"Two random halves of the probes choose the same boundary in {halves['same_boundary_share']:.0%} of halvings"
            f" and differ by {halves['boundary_change']:.1f} layers on average."
        )
    return lines


def describe_sensitivities(profile: LayerProfile) -> list[str]:
    """Two sentences on why relative and absolute sensitivity may choose different boundaries."""
    share = compute_vanished_share(profile)
    return [
        "Relative sensitivity (the paper's) divides the change of the divergence at a layer by the divergence before it, which"
        f" falls to 0 with depth: {share:.0%} of it comes from layers before which the divergence is below 5 % of its start.",
        "Absolute sensitivity is the change itself, large where much was left to change, which is mostly shallow: the two weigh"
        " depth in opposite ways, and a boundary that only one of them supports rests on that choice.",
    ]


def list_pairs(profile: LayerProfile, min_side: int) -> list[list[str]]:
    """Rows under `PAIR_HEADINGS`: what each sensitivity gives under each rule."""
    tried = measure_every_pair(profile, min_side)
    adjusted = correct_holm(list(tried.values()))
    rows = []
    for (kind, rule), (p_value, corrected) in zip(
        [(kind, rule) for kind in SENSITIVITIES for rule in RULES], zip(tried.values(), adjusted)
    ):
        scores = compute_alignment_scores(profile.task_particle, get_sensitivity(profile, kind))
        best = find_choice(scores, profile.model.num_layers, BoundaryOptions(rule=rule, min_side=min_side))
        rows.append([kind, rule, "none" if best is None else str(best), f"{p_value:.3f}", f"{corrected:.3f}"])
    return rows


def _describe_answers(profile: LayerProfile) -> list[str]:
    lines = []
    if profile.copied_share and profile.answer_entropy:
        entropies = profile.answer_entropy.values()
        lines.append(
            f"The answer's first token stands in the context in {_mean(profile.copied_share):.0%} of the probes"
            f" ({_extremes(profile.copied_share)}); the entropy of the answer is {_mean(profile.answer_entropy):.2f} nats,"
            f" {min(entropies):.2f} to {max(entropies):.2f} by group."
        )
    return [*lines, _compare_right_and_wrong(profile)]


def _compare_right_and_wrong(profile: LayerProfile) -> str:
    """Whether wrong answers measure what right ones do, or why that cannot be said."""
    found = profile.right_and_wrong
    if profile.num_right is None:
        return "Right and wrong answers were not compared: the profile is older than the comparison."
    if found is None:
        few = [
            f"too few {kind} answers ({count} of {profile.num_probes}; {ENOUGH_ANSWERS} are needed)"
            for kind, count in (("right", profile.num_right), ("wrong", profile.num_probes - profile.num_right))
            if count < ENOUGH_ANSWERS
        ]
        why = " and ".join(few) or "too few groups hold both kinds"
        return f"{why[0].upper()}{why[1:]}: whether right and wrong answers measure the same cannot be said."
    differs = "more than random assignments do" if found.p_value < SIGNIFICANT else "no more than random assignments do"
    meaning = "read the two apart" if found.p_value < SIGNIFICANT else "no difference was found"
    return (
        f"Within groups, the profiles of {found.num_right} right and {found.num_wrong} wrong answers rank layers alike with"
        f" {found.task_particle_correlation:.2f} (task particle) and {found.sensitivity_correlation:.2f} (sensitivity), and"
        f" differ {differs} (p = {found.p_value:.2g}): {meaning}."
    )


def _describe_layout(profile: LayerProfile) -> list[str]:
    if profile.empty_side_boundary is None:
        return []
    return [
        f"The profile is of layout 1, whose rule counted an empty side as 0 and chose boundary {profile.empty_side_boundary};"
        " what follows is computed anew from its measurement."
    ]


def _describe_evidence(choice: BoundaryChoice) -> list[str]:
    if choice.best_boundary is None or choice.boundary_range is None or choice.rating is None:
        why = explain_no_support(None, 1.0)
        return [f"{why[0].upper()}{why[1:]} ({choice.rule} rule)."]
    low, high = choice.boundary_range
    best = choice.best_boundary
    second = (
        "" if choice.has_default_pair else "; corrected for two tries, since sensitivity or rule are not the defaults"
    )
    lines = [
        f"The best boundary is {best}: S = {choice.alignment_score[best - 1]:+.2f} ({choice.rule} rule,"
        f" {choice.sensitivity} sensitivity).",
        f"Layers in other orders reach its score with p = {choice.p_value:.2g} (shifted {choice.shift_p:.2g}, in blocks"
        f" {choice.block_p:.2g}, the larger counts{second}); with layers weighted at random it lies from {low} to {high}"
        " (95 %).",
    ]
    if choice.is_supported:
        return [*lines, "So shallow and deep layers differ; the range says how well the place is known."]
    return [*lines, "So the measurement supports no boundary: this one is as good as noise gives."]


def _describe_probe_stability(profile: LayerProfile, choice: BoundaryChoice) -> list[str]:
    shares = profile.probe_stability.get(choice.rule)
    if (
        not shares
        or choice.best_boundary is None
        or (choice.rule == "change_point" and choice.min_side != DEFAULT_MIN_SIDE)
    ):
        return []
    best = choice.best_boundary
    rivals = sorted((k for k in range(1, len(shares) + 1) if k != best), key=lambda k: -shares[k - 1])
    beside = f"; next is {rivals[0]} with {shares[rivals[0] - 1]:.0%}" if rivals and shares[rivals[0] - 1] > 0 else ""
    alike = "" if _varies(profile) else ", most of which are alike, since groups hold a single probe"
    return [
        f"It is chosen in {shares[best - 1]:.0%} of bootstrap resamples of the probes{beside}{alike}: stability over probes,"
        " which noise between layers has too."
    ]


def _name_ratio_scores(choice: BoundaryChoice) -> str:
    return ", ".join(
        f"{name} {'does not exist' if score is None else f'{score:+.3f}'}"
        for name, score in choice.ratio_scores.items()
    )


def get_answered_share(profile: LayerProfile) -> float:
    """Share of the probes that are answered rightly; the mean of the groups' where a profile did not count them."""
    if profile.num_right is not None:
        return profile.num_right / profile.num_probes
    return _mean(profile.answered_share) if profile.answered_share else 0.0


def _varies(profile: LayerProfile) -> bool:
    """Whether resamples of the probes within their groups differ: a group needs two."""
    return profile.num_probes >= 2 * len(profile.groups)


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _extremes(shares: dict[str, float]) -> str:
    named = sorted(shares.items(), key=lambda item: item[1])
    (low, lowest), (high, highest) = named[0], named[-1]
    if lowest == highest:
        return f"{lowest:.0%} in every group"
    return f"from {lowest:.0%} in {low} to {highest:.0%} in {high}"


def _interval(profile: LayerProfile, name: str, index: int) -> str:
    intervals = profile.uncertainty.get(name, []) if _varies(profile) else []
    return f", 95 % interval {intervals[index].low:.2f} to {intervals[index].high:.2f}" if intervals else ""
