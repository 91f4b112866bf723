"""A tracer replica: loads the model once and measures batches of probes."""

from __future__ import annotations

from typing import Any

import torch

from layerplan.config.trace import TraceConfig
from layerplan.models.ref import ModelRef
from layerplan.tracer.encode import EncodedProbe
from layerplan.tracer.meter import ProbeMeter
from layerplan.tracer.model_runner import LayerRunner

SECONDS = "seconds"
"""Column of a probe's share of the time its batch took, by what was computed."""


class TracerActor:
    """Maps rows that hold one batch of encoded probes each to one row per probe."""

    def __init__(self, model: ModelRef, config: TraceConfig) -> None:
        on_gpu = torch.cuda.is_available() and config.num_gpus_per_actor > 0
        # float32: rounding to bfloat16 alone moves JS by up to 3e-2
        loaded = model.load(dtype=torch.float32)
        self._meter = ProbeMeter(LayerRunner(loaded.to("cuda" if on_gpu else "cpu")), config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Measures the batches; every output column has one entry per probe."""
        self._meter.seconds.clear()
        records = [record for probes in batch["probes"] for record in self._meter.measure(decode_batch(probes))]
        shares = {part: seconds / len(records) for part, seconds in self._meter.seconds.items()}
        return {name: [record[name] for record in records] for name in records[0]} | {SECONDS: [shares] * len(records)}


def encode_batch(probes: list[EncodedProbe]) -> list[dict[str, Any]]:
    """A batch as plain values, which Ray Data carries."""
    return [
        vars(probe) | {"input_ids": list(probe.input_ids), "is_context": list(probe.is_context)} for probe in probes
    ]


def decode_batch(values: Any) -> list[EncodedProbe]:
    """The batch `encode_batch` wrote."""
    return [
        EncodedProbe(
            id=str(value["id"]),
            group=str(value["group"]),
            input_ids=tuple(int(token) for token in value["input_ids"]),
            is_context=tuple(bool(flag) for flag in value["is_context"]),
            gold_id=int(value["gold_id"]),
            checks_mask=bool(value["checks_mask"]),
        )
        for value in values
    ]
