"""From one number per layer to the layers that train: the best of them, as many as asked for or paid for, or one side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from layerplan.config.plan import MeasuredPlanConfig
from layerplan.errors import PlanError
from layerplan.plan.freeze_plan import Modules
from layerplan.plan.layer_evidence import Step, TopTest, find_step, rate_top
from layerplan.plan.layer_measurement import LayerMeasurement
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.modules import by_layer, choose_top_share, settle
from layerplan.plan.permutation import SIGNIFICANT

Layers = tuple[int, ...]


def choose_measured(
    config: MeasuredPlanConfig, measurement: LayerMeasurement, price: Callable[[Layers], float]
) -> tuple[Layers, str, dict[str, Any]]:
    """Chooses layers by a measurement.

    Args:
        config: What is chosen, and how many.
        measurement: One number per layer.
        price: FLOPs of training these layers, as a share of those of training everything.

    Returns:
        The layers, one sentence that says why, and what a plan keeps of the measurement and its test.

    Raises:
        PlanError: When k or the limit does not fit the model, or the measurement supports no choice and that is an error.
    """
    if config.select == "boundary":
        return _choose_side(config, measurement)
    num_layers = len(measurement.values)
    order = measurement.rank(from_worst=config.end == "worst")
    k = _find_k(config, order, price, num_layers)
    tested = rate_top(measurement.turned_repeats, k)
    _require_evidence(config, tested.p_value, f"repeats of {measurement.name} do not agree on its {k} best layers")
    layers = tuple(sorted(order[:k]))
    which = "most" if config.end == "best" else "least"
    reason = (
        f"The {k} layers of {num_layers} that {_name(measurement)} speaks {which} for training ({_describe(tested)})."
    )
    return layers, reason, _keep(measurement, k=k, end=config.end, top_p=tested.p_value, agreement=tested.agreement)


def choose_measured_modules(
    config: MeasuredPlanConfig,
    measurement: LayerMeasurement,
    shape: ModelShape,
    price: Callable[[Layers, Modules], float],
) -> tuple[Layers, Modules, str, dict[str, Any]]:
    """Chooses single matrices by the numbers of their kinds: of each kind the top share of layers.

    Args:
        config: The share, or the FLOPs it may cost.
        measurement: Of which the repeats are kinds of matrices.
        shape: Sizes of the model.
        price: FLOPs of training modules of these layers, as a share of those of training everything.

    Returns:
        Layers, modules, one sentence that says why, and what a plan keeps of the measurement.

    Raises:
        PlanError: When the share leaves no matrix of any kind, or the limit is below the cheapest choice.
    """
    kinds = dict(zip(measurement.repeat_names, measurement.repeats, strict=True))

    def pick(share: float) -> dict[str, list[int]]:
        return choose_top_share(kinds, share, from_worst=config.end == "worst")

    def choose(share: float) -> tuple[Layers, Modules]:
        return settle(by_layer(pick(share)), shape)

    share = config.top_share or _find_share(config, choose, price, len(measurement.values))
    layers, modules = choose(share)
    if not layers:
        raise PlanError(
            f"plan.top_share={share}: is less than one layer of {len(measurement.values)} for every kind of matrix; raise it"
        )
    num_matrices = sum(map(len, pick(share).values()))
    which = "highest" if config.end == "best" else "lowest"
    reason = (
        f"The {share:.3g} of layers with the {which} signal to noise, for each of {len(kinds)} kinds of matrices by itself:"
        f" {num_matrices} matrices in {len(layers)} of {len(measurement.values)} layers."
    )
    kept = _keep(measurement, unit="module", top_share=share, end=config.end)
    kept["measurement"]["kinds"] = kinds
    return layers, modules, reason, kept


def _find_share(
    config: MeasuredPlanConfig,
    choose: Callable[[float], tuple[Layers, Modules]],
    price: Callable[[Layers, Modules], float],
    num_layers: int,
) -> float:
    """The largest share of the layers that the limit pays for."""
    limit = config.max_flops_share
    assert limit is not None, "the config gives one of the two"
    costs = {share: price(*choose(share)) for share in (count / num_layers for count in range(1, num_layers + 1))}
    fitting = [share for share, cost in costs.items() if cost <= limit]
    if not fitting:
        raise PlanError(
            f"plan.max_flops_share={limit}: one layer of each kind of matrix costs {min(costs.values()):.3f} of training"
            " everything; raise it"
        )
    return max(fitting)


def _choose_side(config: MeasuredPlanConfig, measurement: LayerMeasurement) -> tuple[Layers, str, dict[str, Any]]:
    num_layers = len(measurement.values)
    higher = measurement.higher_trains == (config.end == "best")
    step = find_step(measurement.values, min_side=config.min_side, freeze=config.freeze, higher_trains=higher)
    if step is None:
        raise PlanError(
            f"plan.min_side={config.min_side}: {num_layers} layers have no boundary with so many on either side; set at"
            f" most {num_layers // 2}"
        )
    _require_evidence(
        config, step.p_value, f"layers in other orders have as large a step of {measurement.name} as at {step.boundary}"
    )
    layers = tuple(range(step.boundary) if step.freeze == "deep" else range(step.boundary, num_layers))
    reason = (
        f"{_name(measurement).capitalize()} changes most at boundary {step.boundary} (p = {step.p_value:.2g}); the"
        f" {step.freeze} side freezes."
    )
    return layers, reason, _keep(measurement, end=config.end, step=_describe_step(step))


def _describe_step(step: Step) -> dict[str, Any]:
    return {"boundary": step.boundary, "freeze": step.freeze, "rating": step.rating, "p_value": step.p_value}


def _find_k(config: MeasuredPlanConfig, order: list[int], price: Callable[[Layers], float], num_layers: int) -> int:
    if config.max_flops_share is None:
        assert config.k is not None, "the config gives one of the two"
        if config.k > num_layers:
            raise PlanError(f"plan.k={config.k}: must lie in 1..{num_layers}")
        return config.k
    affordable = count_affordable(order, price, config.max_flops_share)
    if affordable is None:
        least = price((order[0],))
        raise PlanError(
            f"plan.max_flops_share={config.max_flops_share}: layer {order[0]} alone costs {least:.3f} of training"
            " everything; raise it"
        )
    return affordable


def count_affordable(order: Sequence[int], price: Callable[[Layers], float], max_share: float) -> int | None:
    """How many layers of an order, from its first, cost at most a share of the FLOPs; None when the first alone costs more."""
    fitting = (k for k in range(1, len(order) + 1) if price(tuple(sorted(order[:k]))) <= max_share)
    return max(fitting, default=None)


def _require_evidence(config: MeasuredPlanConfig, p_value: float | None, what: str) -> None:
    if config.without_evidence == "error" and (p_value is None or p_value >= SIGNIFICANT):
        p = "no test" if p_value is None else f"p = {p_value:.2g}"
        raise PlanError(
            f"plan.without_evidence=error: {what} ({p}); measure more rows (measure.num_rows), set best, or name layers"
            " with plan.type=explicit"
        )


def _keep(measurement: LayerMeasurement, **choice: Any) -> dict[str, Any]:
    return {
        "measurement": {
            "name": measurement.name,
            "sha256": measurement.sha256,
            "values": measurement.values,
            "higher_trains": measurement.higher_trains,
            "text": None if measurement.text is None else measurement.text.model_dump(mode="json"),
            "cost": measurement.cost.model_dump(mode="json"),
            **choice,
        }
    }


def _name(measurement: LayerMeasurement) -> str:
    return measurement.name.replace("_", " ")


def _describe(tested: TopTest) -> str:
    if tested.p_value is None:
        return "no repeats to test it by" if tested.agreement is None else "every layer, so there is nothing to test"
    return f"p = {tested.p_value:.2g}, agreement of repeats {tested.agreement:.2f}"
