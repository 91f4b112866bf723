"""The plan that a finished study found best for what is wanted and paid for; the study speaks, nothing here is tuned.

Plans of the study are carried over by their share of trained layers and where they lie, and priced on the model at
hand, where the same share may cost another share of the FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

from layerplan.config.plan import RecommendedPlanConfig
from layerplan.errors import PlanError
from layerplan.plan.selectors import space_layers
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
    finished = sorted((each for each in studies if each.is_finished), key=lambda each: _rank_study(each, num_layers))
    if not finished:
        raise PlanError("plan.type=recommended: no study is finished; name layers with another plan type")
    study = finished[0]
    paid = _list_paid(study, config, num_layers, price)
    if not paid:
        cheapest = min(price(_carry_over(plan, study, num_layers)) for plan in study.plans)
        raise PlanError(
            f"plan.max_flops_share={config.max_flops_share}: the cheapest plan of study {study.name} costs"
            f" {cheapest:.3f} of training everything here; raise it"
        )
    best, alike = paid[0], [each for each in paid[1:] if each.score - paid[0].score < _noise(study, config.prefer)]
    others = [(each, found[0]) for each in finished[1:] if (found := _list_paid(each, config, num_layers, price))]
    better = _find_better_rivals(study, config, best.score)
    kept = {
        "prefer": config.prefer,
        "max_flops_share": config.max_flops_share,
        "study": study.model_dump(mode="json", exclude={"plans", "rivals"}),
        "plan": best.plan.model_dump(mode="json"),
        "flops_share": best.share,
        "not_told_from_it": [{**each.plan.model_dump(mode="json"), "flops_share_here": each.share} for each in alike],
        "better_measured": [each.model_dump(mode="json") for each in better],
        "other_studies": {each.name: found.plan.model_dump(mode="json") for each, found in others},
    }
    told = [
        _say_choice(config, study, best, num_layers),
        _say_alike(alike),
        _say_measured(better, study, config, best),
        *(f"Study {each.name}, {_say_base(each)}, would take {_name(found)}." for each, found in others),
        _say_limits(study, studies),
    ]
    return Recommendation(best.layers, " ".join(filter(None, told)), {"recommended": kept})


@dataclass(frozen=True)
class _Priced:
    """A plan of a study, carried over to the model at hand."""

    plan: StudiedPlan
    score: float
    layers: tuple[int, ...] | None
    share: float


def _rank_study(study: Study, num_layers: int) -> tuple[float, int]:
    """The study whose base is nearest in depth first; of those alike the one that trained the most plans."""
    return abs(log(study.num_layers / num_layers)), -len(study.plans)


def _list_paid(
    study: Study, config: RecommendedPlanConfig, num_layers: int, price: Callable[[tuple[int, ...] | None], float]
) -> list[_Priced]:
    """What the limit pays for, the best first, the cheaper one of those alike."""
    found = []
    for plan in study.plans:
        layers = _carry_over(plan, study, num_layers)
        share = price(layers)
        if config.max_flops_share is None or share <= config.max_flops_share + 1e-9:
            found.append(_Priced(plan, _score(plan, study, config.prefer), layers, share))
    return sorted(found, key=lambda each: (each.score, each.share))


def _carry_over(plan: StudiedPlan, study: Study, num_layers: int) -> tuple[int, ...] | None:
    """The same share of layers of the same side, or evenly spaced."""
    if plan.trains == "full":
        return None
    count = min(num_layers - 1, max(1, int(plan.num_trained / study.num_layers * num_layers + 0.5)))
    if plan.trains == "spread":
        return space_layers(count, num_layers)
    return tuple(range(count)) if plan.trains == "shallow" else tuple(range(num_layers - count, num_layers))


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


def _say_choice(config: RecommendedPlanConfig, study: Study, best: _Priced, num_layers: int) -> str:
    plan, what, here = best.plan, "everything, the embeddings too,", "this"
    if best.layers is not None:
        what = f"{_name_layers(plan.trains, plan.num_trained)} of {study.num_layers} layers"
        here = f"here {_name_layers(plan.trains, len(best.layers))} of {num_layers}, which"
    limit = "" if config.max_flops_share is None else f" of those that cost at most {config.max_flops_share:.0%} here"
    losses = ", ".join(f"{text} {plan.loss[text]:.3f} (base {study.base[text]:.3f})" for text in TEXTS)
    return (
        f"Study {study.name} did best on {NAMES[config.prefer]}{limit} with {what} trained: {losses} nats, at a rate of"
        f" {plan.rate:g}; {here} costs {best.share:.0%} of the FLOPs of training everything."
    )


def _say_alike(alike: Sequence[_Priced]) -> str:
    if not alike:
        return "No other plan of it came within the noise of its seeds."
    cheapest = min(alike, key=lambda each: each.share)
    count = "1 other plan" if len(alike) == 1 else f"{len(alike)} other plans"
    return f"{count} came within the noise of its seeds, the cheapest with {_name(cheapest)} at {cheapest.share:.0%}."


def _say_measured(better: Sequence[StudiedPlan], study: Study, config: RecommendedPlanConfig, best: _Priced) -> str:
    """Those that did better beyond what seeds do."""
    noise = _noise(study, config.prefer)
    found = [each for each in better if best.score - _score(each, study, config.prefer) > noise]
    if not found:
        return ""
    names = ", ".join(f"{each.trains} ({each.num_trained} layers, {each.flops_share:.0%})" for each in found)
    return (
        f"Layers that a measurement chose did better still there: {names}; `layerplan measure` measures this model's."
    )


def _name(priced: _Priced) -> str:
    if priced.layers is None:
        return "everything"
    return f"{_name_layers(priced.plan.trains, len(priced.layers))} of this model's layers"


def _name_layers(trains: str, count: int) -> str:
    return f"{count} evenly spaced" if trains == "spread" else f"the {trains} {count}"


def _say_base(study: Study) -> str:
    return f"of a base of {study.num_layers} layers ({study.model_type})"


def _say_limits(study: Study, studies: Sequence[Study]) -> str:
    finished = [each for each in studies if each.is_finished]
    left = [f"{each.name} has {each.done} of {each.planned} trainings" for each in studies if not each.is_finished]
    rests = (
        "This rests on one finished study" if len(finished) == 1 else f"This is the nearest of {len(finished)} studies"
    )
    unfinished = f"; {', '.join(left)}" if left else ""
    return f"{rests}, {_say_base(study)}, {study.tokens:,} tokens a training, {len(study.seeds)} seeds{unfinished}."
