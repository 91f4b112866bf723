"""The plan that a finished study found best for what is wanted and paid for; the study speaks, nothing here is tuned.

Plans of the study are carried over by their share of trained layers and the side they lie on, and priced on the model at
hand, where the same share may cost another share of the FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

from layerplan.config.plan import RecommendedPlanConfig
from layerplan.errors import PlanError
from layerplan.plan.study_evidence import StudiedPlan, Study, StudyEvidence, Text, load_study_evidence

TEXTS: tuple[Text, ...] = ("target", "source")
WEIGHTS: dict[str, dict[Text, float]] = {
    "adaptation": {"target": 1.0, "source": 0.0},
    "retention": {"target": 0.0, "source": 1.0},
    "balanced": {"target": 0.5, "source": 0.5},
}
"""What each preference minds: the loss on a text above the study's best there, as a share of its plans' spread."""
NAMES = {"adaptation": "held-out target text", "retention": "held-out source text", "balanced": "both texts alike"}
ALIKE_ERRORS = 2.0
"""Standard errors of a difference, by seeds, within which two plans are not told apart."""


@dataclass(frozen=True)
class Recommendation:
    """A plan of the study on the model at hand."""

    layers: tuple[int, ...] | None
    """Layers that train; None for everything."""
    reason: str
    """Why, by which study, and how much that says."""
    evidence: dict[str, Any]
    """What a sealed plan keeps of it."""


def recommend(
    config: RecommendedPlanConfig,
    num_layers: int,
    price: Callable[[tuple[int, ...] | None], float],
    evidence: StudyEvidence | None = None,
) -> Recommendation:
    """Chooses the best plan of the nearest finished study that the limit pays for.

    Args:
        config: What is preferred, and the largest share of the FLOPs of training everything.
        num_layers: Decoder layers of the model at hand.
        price: Share of those FLOPs that training these layers costs, None for everything.
        evidence: Studies; the package's own when left out.

    Raises:
        PlanError: When no study is finished, or the limit pays for none of its plans.
    """
    studies = (evidence or load_study_evidence()).studies
    study = _find_study(studies, num_layers)
    rated = _rate(study, config.prefer)
    priced = [(plan, score, price(_carry_over(plan, study, num_layers))) for plan, score in rated]
    paid = [item for item in priced if config.max_flops_share is None or item[2] <= config.max_flops_share + 1e-9]
    if not paid:
        cheapest = min(priced, key=lambda item: item[2])
        raise PlanError(
            f"plan.max_flops_share={config.max_flops_share}: the cheapest plan of study {study.name} costs"
            f" {cheapest[2]:.3f} of training everything here; raise it"
        )
    best, score, share = min(paid, key=lambda item: (item[1], item[2]))
    alike = [item for item in paid if item[0] is not best and item[1] - score < _noise(study, config.prefer)]
    kept = {
        "prefer": config.prefer,
        "max_flops_share": config.max_flops_share,
        "study": study.model_dump(mode="json", exclude={"plans", "rivals"}),
        "plan": best.model_dump(mode="json"),
        "flops_share": share,
        "not_told_from_it": [{**item[0].model_dump(mode="json"), "flops_share_here": item[2]} for item in alike],
        "better_measured": [each.model_dump(mode="json") for each in _find_better_rivals(study, config, score)],
    }
    told = [
        _say_choice(config, study, best, share, num_layers),
        _say_alike(alike, study, num_layers),
        _say_limits(study, studies),
    ]
    return Recommendation(_carry_over(best, study, num_layers), " ".join(filter(None, told)), {"recommended": kept})


def _find_study(studies: Sequence[Study], num_layers: int) -> Study:
    """The finished study whose base is nearest in depth."""
    finished = [study for study in studies if study.is_finished]
    if not finished:
        raise PlanError("plan.type=recommended: no study is finished; name layers with another plan type")
    return min(finished, key=lambda study: abs(log(study.num_layers / num_layers)))


def _carry_over(plan: StudiedPlan, study: Study, num_layers: int) -> tuple[int, ...] | None:
    """The same share of layers of the same side."""
    if plan.trains == "full":
        return None
    count = min(num_layers - 1, max(1, int(plan.num_trained / study.num_layers * num_layers + 0.5)))
    return tuple(range(count)) if plan.trains == "shallow" else tuple(range(num_layers - count, num_layers))


def _rate(study: Study, prefer: str) -> list[tuple[StudiedPlan, float]]:
    """Every plan with its score, low is good."""
    return [(plan, _score(plan, study, prefer)) for plan in study.plans]


def _score(plan: StudiedPlan, study: Study, prefer: str) -> float:
    score = 0.0
    for text in TEXTS:
        losses = [each.loss[text] for each in study.plans]
        score += WEIGHTS[prefer][text] * (plan.loss[text] - min(losses)) / (max(losses) - min(losses))
    return score


def _noise(study: Study, prefer: str) -> float:
    """Difference of scores that seeds alone make."""
    errors = []
    for text in TEXTS:
        losses = [plan.loss[text] for plan in study.plans]
        error = study.noise[text] * sqrt(2 / len(study.seeds)) / (max(losses) - min(losses))
        errors.append(WEIGHTS[prefer][text] * error)
    return ALIKE_ERRORS * sqrt(sum(error**2 for error in errors))


def _find_better_rivals(study: Study, config: RecommendedPlanConfig, score: float) -> list[StudiedPlan]:
    """Choices of measurements that the study found better, at a cost that the limit allows there."""
    limit = config.max_flops_share or 1.0
    return [each for each in study.rivals if each.flops_share <= limit and _score(each, study, config.prefer) < score]


def _say_choice(config: RecommendedPlanConfig, study: Study, best: StudiedPlan, share: float, num_layers: int) -> str:
    layers = _carry_over(best, study, num_layers)
    what, here = "everything, the embeddings too,", "this"
    if layers is not None:
        what = f"the {best.trains} {best.num_trained} of {study.num_layers} layers"
        here = f"here the {best.trains} {len(layers)} of {num_layers}, which"
    limit = "" if config.max_flops_share is None else f" of those that cost at most {config.max_flops_share:.0%} here"
    losses = ", ".join(f"{text} {best.loss[text]:.3f} (base {study.base[text]:.3f})" for text in TEXTS)
    return (
        f"Study {study.name} did best on {NAMES[config.prefer]}{limit} with {what} trained: {losses} nats, at a rate of"
        f" {best.rate:g}; {here} costs {share:.0%} of the FLOPs of training everything."
    )


def _say_alike(alike: Sequence[tuple[StudiedPlan, float, float]], study: Study, num_layers: int) -> str:
    if not alike:
        return "No other plan of it came within the noise of its seeds."
    cheapest, _, share = min(alike, key=lambda item: item[2])
    layers = _carry_over(cheapest, study, num_layers)
    where = "everything" if layers is None else f"the {cheapest.trains} {len(layers)} layers of this model"
    return f"{len(alike)} other plans came within the noise of its seeds, the cheapest with {where} at {share:.0%}."


def _say_limits(study: Study, studies: Sequence[Study]) -> str:
    finished = [each for each in studies if each.is_finished]
    left = [f"{each.name} has {each.done} of {each.planned} trainings" for each in studies if not each.is_finished]
    rests = (
        "This rests on one finished study" if len(finished) == 1 else f"This is the nearest of {len(finished)} studies"
    )
    unfinished = f"; {', '.join(left)}" if left else ""
    return (
        f"{rests}, of a base of {study.num_layers} layers ({study.model_type}), {study.tokens:,} tokens a training,"
        f" {len(study.seeds)} seeds{unfinished}."
    )
