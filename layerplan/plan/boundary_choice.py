"""From a measurement to a boundary: what the rule finds, whether layers in other orders do as well, what then decides.

Everything here is a function of the profile and the options, so a profile of any age can be asked under any rule.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerplan.config.base import StrictModel
from layerplan.config.plan import DEFAULT_MIN_SIDE, BoundaryOptions, BoundaryRule, PlanConfig, SchedulePlanConfig
from layerplan.config.trace import Sensitivity
from layerplan.errors import PlanError
from layerplan.plan.boundary import (
    PAPER_RATIOS,
    RULES,
    Array,
    check_boundary,
    compute_alignment_scores,
    compute_boundary,
    find_best_boundary,
    list_candidates,
    rate_boundaries,
)
from layerplan.plan.holm import correct_holm
from layerplan.plan.layer_profile import LayerProfile
from layerplan.plan.permutation import SIGNIFICANT, compare_with_other_orders, find_boundary_range

SENSITIVITIES: tuple[Sensitivity, ...] = ("relative", "absolute")
DEFAULT_PAIR: tuple[Sensitivity, BoundaryRule] = ("relative", "change_point")
"""Sensitivity and rule that were fixed before looking; any other pair is a second try."""
VANISHED = 0.05
"""Share of JS(0) below which little is left for a layer to change."""


class BoundaryChoice(StrictModel):
    """What a measurement says about the boundary, and what was made of it; `evidence.boundary` of a plan."""

    rule: BoundaryRule
    """Form of S(k) that was compared."""
    sensitivity: Sensitivity
    """Sensitivity S(k) was made of."""
    min_side: int
    """Fewest layers on either side, under `change_point`."""
    without_evidence: Literal["midpoint", "best", "error"]
    """What was to happen without evidence."""
    alignment_score: list[float]
    """S(k) for k = 1..L-2."""
    best_boundary: int | None
    """Boundary the rule finds; None when the model has too few layers for it."""
    rating: float | None
    """The rule's form of S there."""
    shift_p: float
    """p of shifting the layers of both profiles, independently of each other."""
    block_p: float
    """p of putting blocks of layers in random order."""
    p_value: float
    """The larger of the two, after Holm's correction when sensitivity or rule are not the defaults."""
    boundary_range: tuple[int, int] | None
    """Where the boundary may lie, both ends inclusive (95 %)."""
    tried: dict[str, float] = Field(default_factory=dict)
    """p by sensitivity and rule, uncorrected."""
    ratio_scores: dict[str, float | None]
    """S at the paper's three shares of shallow layers; None where it does not exist."""
    decided_by: Literal["evidence", "midpoint", "best"]
    """What decided `boundary`."""
    boundary: int
    """The boundary to cut at."""

    @property
    def is_supported(self) -> bool:
        """Whether the measurement supports a boundary."""
        return self.best_boundary is not None and self.p_value < SIGNIFICANT

    @property
    def has_default_pair(self) -> bool:
        """Whether sensitivity and rule are those fixed beforehand."""
        return (self.sensitivity, self.rule) == DEFAULT_PAIR


def choose_boundary(profile: LayerProfile, options: BoundaryOptions | None = None) -> BoundaryChoice:
    """Asks a profile for a boundary.

    Args:
        profile: The measurement; its options name the sensitivity.
        options: The rule; the defaults when left out.

    Returns:
        The boundary with its evidence, and what decided it.

    Raises:
        PlanError: When `min_side` is more than half of the layers, when the measurement supports no boundary and the
            options call that an error, or when they ask for the best one of a model that is too small to have any.
    """
    options = options or BoundaryOptions()
    num_layers = profile.model.num_layers
    check_min_side(options.min_side, num_layers)
    sensitivity = find_sensitivity(profile)
    particle, values = profile.task_particle, get_sensitivity(profile, sensitivity)
    scores = compute_alignment_scores(particle, values)
    best = find_choice(scores, num_layers, options)
    tested = compare_with_other_orders(particle, values, options.rule, options.min_side)
    tried = measure_every_pair(profile, options.min_side)
    pairs = list(dict.fromkeys([(sensitivity, options.rule), DEFAULT_PAIR]))
    p_value = correct_holm([tried[name_pair(*pair)] for pair in pairs])[0]
    decided_by, boundary = _decide(best, p_value, options, num_layers)
    rated = rate_boundaries(scores, num_layers, options.rule, options.min_side)
    return BoundaryChoice(
        rule=options.rule,
        sensitivity=sensitivity,
        min_side=options.min_side,
        without_evidence=options.without_evidence,
        alignment_score=scores.tolist(),
        best_boundary=best,
        rating=None if best is None else float(rated.max()),
        shift_p=tested.shift_p,
        block_p=tested.block_p,
        p_value=p_value,
        boundary_range=find_boundary_range(particle, values, options.rule, options.min_side),
        tried=tried,
        ratio_scores=score_paper_ratios(scores.tolist(), num_layers),
        decided_by=decided_by,
        boundary=boundary,
    )


def check_min_side(min_side: int, num_layers: int) -> None:
    """Raises `PlanError` when layers were asked for on either side that the model does not have."""
    if min_side > max(DEFAULT_MIN_SIDE, num_layers // 2):
        raise PlanError(
            f"plan.min_side={min_side}: must lie in 1..{num_layers // 2} for a model of {num_layers} layers"
        )


def find_options(config: PlanConfig) -> BoundaryOptions:
    """The boundary options of a plan config, of its first phase that has any, or the defaults."""
    if isinstance(config, BoundaryOptions):
        return config
    phases = [phase.plan for phase in config.phases] if isinstance(config, SchedulePlanConfig) else []
    return next((plan for plan in phases if isinstance(plan, BoundaryOptions)), BoundaryOptions())


def find_sensitivity(profile: LayerProfile) -> Sensitivity:
    """The sensitivity a profile's options name; the paper's for profiles older than the option."""
    return "absolute" if profile.options.get("sensitivity") == "absolute" else "relative"


def get_sensitivity(profile: LayerProfile, kind: Sensitivity) -> list[float]:
    """Relative or absolute sensitivity for l = 1..L-1, so that S exists for the same boundaries with both."""
    return profile.layer_sensitivity if kind == "relative" else profile.absolute_sensitivity[:-1]


def find_choice(scores: Array, num_layers: int, options: BoundaryOptions) -> int | None:
    """The boundary the rule finds in S(k); None without a candidate."""
    if not list_candidates(num_layers, options.rule, options.min_side):
        return None
    return int(find_best_boundary(scores, num_layers, options.rule, options.min_side))


def measure_every_pair(profile: LayerProfile, min_side: int) -> dict[str, float]:
    """The p of each sensitivity with each rule, uncorrected."""
    return {
        name_pair(kind, rule): compare_with_other_orders(
            profile.task_particle, get_sensitivity(profile, kind), rule, min_side
        ).p_value
        for kind in SENSITIVITIES
        for rule in RULES
    }


def name_pair(sensitivity: Sensitivity, rule: BoundaryRule) -> str:
    """Key of `tried`."""
    return f"{sensitivity}, {rule}"


def score_paper_ratios(scores: list[float], num_layers: int) -> dict[str, float | None]:
    """S at the paper's shares of shallow layers; None where S does not exist."""
    boundaries = {name: compute_boundary(ratio, num_layers) for name, ratio in PAPER_RATIOS.items()}
    return {name: scores[k - 1] if k <= len(scores) else None for name, k in boundaries.items()}


def compute_vanished_share(profile: LayerProfile) -> float:
    """Share of the relative sensitivity that comes from layers whose JS(l-1), what they divide by, is below 5 % of JS(0)."""
    total = sum(profile.layer_sensitivity)
    limit = VANISHED * profile.js[0]
    vanished = sum(value for value, js in zip(profile.layer_sensitivity, profile.js) if js < limit)
    return vanished / total if total > 0 else 0.0


def _decide(
    best: int | None, p_value: float, options: BoundaryOptions, num_layers: int
) -> tuple[Literal["evidence", "midpoint", "best"], int]:
    if best is not None and p_value < SIGNIFICANT:
        return "evidence", best
    if options.without_evidence == "error":
        raise PlanError(
            f"plan.without_evidence=error: {explain_no_support(best, p_value)}; set midpoint or best, or name a boundary"
            " with plan.type=freeze_deep"
        )
    if options.without_evidence == "best":
        if best is None:
            raise PlanError(
                f"plan.without_evidence=best: {num_layers} layers leave no boundary with plan.min_side={options.min_side}"
                " layers on either side; set a smaller min_side, or midpoint"
            )
        return "best", best
    return "midpoint", check_boundary(num_layers // 2, num_layers)


def explain_no_support(best: int | None, p_value: float) -> str:
    """Why a measurement decides nothing, as the first half of a sentence."""
    if best is None:
        return "the measurement supports no boundary, since the model has too few layers for one"
    return (
        f"the measurement supports no boundary (the best is {best}, but layers in other orders score as high with"
        f" p = {p_value:.2g})"
    )


def explain_choice(choice: BoundaryChoice) -> str:
    """One sentence: the boundary, its evidence, or that there is none."""
    found = f"{choice.rule} rule, {choice.sensitivity} sensitivity"
    if choice.decided_by == "evidence":
        assert choice.boundary_range is not None, "a boundary that was found has candidates beside it"
        low, high = choice.boundary_range
        return (
            f"Boundary {choice.boundary} is supported by the measurement (p = {choice.p_value:.2g}, {found}; it may lie from"
            f" {low} to {high})"
        )
    why = explain_no_support(choice.best_boundary, choice.p_value)
    if choice.decided_by == "midpoint":
        return f"Boundary {choice.boundary} is the middle, because {why}"
    return f"Boundary {choice.boundary} is the best of the {found} and no more, because {why}"
