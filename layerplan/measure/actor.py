"""A process that measures with a model of its own: loads it once and does one piece of work after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerplan.config.measure import MeasureConfig
from layerplan.config.train import OptimizerConfig
from layerplan.measure.gradients import compute_fisher, compute_gradient_norms
from layerplan.measure.influence import compute_block_influence
from layerplan.measure.pilot import run_pilot
from layerplan.measure.tuned_lens import compute_lens_gains
from layerplan.measure.work import timed
from layerplan.models.ref import ModelRef
from layerplan.tracer.model_runner import LayerRunner


class MeasuringActor:
    """Maps rows that name one piece each to its numbers: one list of L values per repeat."""

    def __init__(
        self, model: ModelRef, config: MeasureConfig, optimizer: OptimizerConfig, text: NDArray[np.int32]
    ) -> None:
        self._ref, self._config, self._optimizer, self._text = model, config, optimizer, text
        self._device = torch.device("cuda" if torch.cuda.is_available() and config.num_gpus_per_actor > 0 else "cpu")
        self._loaded: LayerRunner | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Does the pieces, one result per row."""
        pieces = zip(batch["key"], batch["measurement"], batch["number"], batch["rows"])
        done = [(str(key), *self._measure(str(name), int(number), rows)) for key, name, number, rows in pieces]
        return {
            "key": [key for key, _, _ in done],
            "values": [values for _, values, _ in done],
            "seconds": [seconds for _, _, seconds in done],
        }

    def _measure(self, name: str, number: int, rows: Sequence[int]) -> tuple[list[list[float]], float]:
        runner = self._runner()
        ids_BT = torch.from_numpy(self._text[list(rows)].astype(np.int64)).to(self._device)
        return timed(lambda: self._work(runner, name, number, ids_BT))

    def _work(self, runner: LayerRunner, name: str, number: int, ids_BT: Tensor) -> list[list[float]]:
        match name:
            case "block_influence":
                return [compute_block_influence(run_states(runner, ids_BT))]
            case "gradient_norm":
                return [compute_gradient_norms(runner.model, ids_BT)]
            case "fisher":
                return [compute_fisher(runner.model, ids_BT, seed=self._config.seed + number)]
            case "tuned_lens_gain":
                return measure_lens(runner, ids_BT, fold=number, config=self._config)
        steps = ids_BT.split(self._config.pilot_rows)
        self._loaded = None  # its weights are about to change
        return run_pilot(runner.model, steps, self._optimizer)

    def _runner(self) -> LayerRunner:
        if self._loaded is None:
            self._loaded = LayerRunner(self._ref.load(dtype=torch.float32).to(self._device))
        return self._loaded


@torch.no_grad()
def run_states(runner: LayerRunner, ids_BT: Tensor) -> Tensor:
    """The residual stream around every layer: (L + 1, B, T, D)."""
    return runner.run(ids_BT)


@torch.no_grad()
def measure_lens(runner: LayerRunner, ids_BT: Tensor, *, fold: int, config: MeasureConfig) -> list[list[float]]:
    """Gains of the tuned lens on every other row, its translators fitted on the rest: one list of L values per row.

    Args:
        runner: The model.
        ids_BT: All rows.
        fold: 0 asks on the rows with even numbers, 1 on the others.
        config: How many positions are asked at, over both folds.
    """
    fitted, asked = ids_BT[1 - fold :: 2], ids_BT[fold::2]
    states = torch.cat([runner.run(row).flatten(1, 2) for row in fitted.split(1)], dim=1)
    per_row = max(1, config.lens_positions // len(ids_BT))
    num_tokens = ids_BT.shape[1]
    places = torch.linspace(0, num_tokens - 2, min(per_row, num_tokens - 1), device=ids_BT.device).long()
    seen = torch.cat([runner.run(row)[:, 0, places] for row in asked.split(1)], dim=1)
    gains = compute_lens_gains(states, seen, asked[:, places + 1].flatten(), runner.lens)
    return np.array(gains).reshape(len(asked), len(places), -1).mean(1).tolist()
