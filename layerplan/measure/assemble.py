"""From finished pieces of work to measurements: repeats in order, their means, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layerplan.config.measure import MeasureConfig, Measurement
from layerplan.config.train import TrainConfig
from layerplan.measure.costs import predict_flops
from layerplan.measure.spectrum import Matrix, collect_kinds, rate_layers
from layerplan.measure.text import TextRows
from layerplan.measure.work import Piece
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_measurement import LayerMeasurement, MeasuringCost

OPTIONS: dict[Measurement, tuple[str, ...]] = {
    "spectrum": (),
    "block_influence": ("seed",),
    "gradient_norm": ("seed",),
    "fisher": ("seed",),
    "pilot": ("seed", "pilot_share", "pilot_rows"),
    "tuned_lens_gain": ("seed", "lens_positions"),
}
"""Fields of the config that decide a measurement's numbers, beside the text."""


@dataclass(frozen=True)
class Measured:
    """The pieces that were asked for, and what came of each by its key."""

    pieces: Sequence[Piece]
    done: Mapping[str, Mapping[str, Any]]

    def of(self, name: Measurement) -> list[Piece]:
        """The pieces of a measurement by their number."""
        return sorted((piece for piece in self.pieces if piece.measurement == name), key=lambda piece: piece.number)

    def read(self, name: Measurement) -> list[list[float]]:
        """Everything its pieces gave, in order."""
        return [list(values) for piece in self.of(name) for values in self.done[piece.key]["values"]]

    def count_seconds(self, name: Measurement) -> float:
        """Time its pieces took in the processes that did them."""
        return float(sum(self.done[piece.key]["seconds"] for piece in self.of(name)))


def assemble(
    wanted: Sequence[Measurement],
    measured: Measured,
    *,
    model: ModelRef,
    config: MeasureConfig,
    train: TrainConfig,
    text: TextRows | None,
    matrices: Sequence[Matrix],
) -> list[LayerMeasurement]:
    """One measurement for each name that was asked for, in that order."""
    shape = model.shape()
    found = []
    for name in wanted:
        if name == "spectrum":
            kinds = collect_kinds(matrices, [ratio for (ratio,) in measured.read(name)], shape.num_layers)
            cost = MeasuringCost(
                seconds=measured.count_seconds(name), flops=sum(matrix.flops for matrix in matrices), tokens=0
            )
            found.append(
                LayerMeasurement(
                    name=name,
                    values=rate_layers(kinds),
                    repeats=list(kinds.values()),
                    repeated_over="kinds of matrices",
                    repeat_names=list(kinds),
                    cost=cost,
                )
            )
            continue
        assert text is not None, "every other measurement reads text"
        num_tokens = sum(len(piece.rows) for piece in measured.of(name)) * config.seq_len
        flops = predict_flops(name, shape, model.identity(), config, num_tokens)
        cost = MeasuringCost(seconds=measured.count_seconds(name), flops=flops, tokens=num_tokens)
        found.append(_from_text(name, measured, config, train, text, cost))
    return found


def _from_text(
    name: Measurement,
    measured: Measured,
    config: MeasureConfig,
    train: TrainConfig,
    text: TextRows,
    cost: MeasuringCost,
) -> LayerMeasurement:
    repeats = measured.read(name)
    if name == "tuned_lens_gain":
        half = -(-config.num_rows // 2)
        order = [row for pair in zip(range(half), range(half, 2 * half)) for row in pair if row < config.num_rows]
        repeats = [repeats[row] for row in order]  # the folds asked at even rows, then at odd ones
    pieces = measured.of(name)
    rows = list(dict.fromkeys(row for piece in pieces for row in piece.rows))
    options = {field: getattr(config, field) for field in OPTIONS[name]}
    if name == "pilot":
        options |= {"steps": len(repeats), "optimizer": train.optimizer.model_dump(mode="json")}
    return LayerMeasurement(
        name=name,
        values=[float(value) for value in np.mean(repeats, axis=0)],
        repeats=[list(row) for row in repeats],
        repeated_over="steps" if name == "pilot" else "rows of text",
        text=text.describe(rows),
        options=options,
        cost=cost,
    )
