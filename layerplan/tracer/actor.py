"""A tracer replica: loads the model once and measures batches of probes, mapped over them by Ray Data."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from layerplan.config.trace import TraceConfig
from layerplan.errors import LayerplanError
from layerplan.models.causal_lm import load_causal_lm
from layerplan.storage.mirror import fetch_folder
from layerplan.tracer.encode import EncodedProbe
from layerplan.tracer.meter import ProbeMeter
from layerplan.tracer.model_runner import LayerRunner

FAULT = "fault"


class TracerActor:
    """Maps rows that hold one batch of encoded probes each to one row per probe, or to one row with a fault."""

    def __init__(self, model_name: str, revision: str, trust_remote_code: bool, config: TraceConfig) -> None:
        self._arguments = (model_name, revision, trust_remote_code, config)
        self._meter: ProbeMeter | None = None
        self._fault: LayerplanError | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Measures the batches; every output column has one entry per probe.

        A `LayerplanError` is returned as a value, the pickled `fault`: one that is raised reaches the driver as Ray
        Data's own error, without its cause, and one raised in `__init__` as an actor that died.
        """
        if self._fault is None:
            try:
                return self._measure(batch)
            except LayerplanError as error:
                self._fault = error
        return {FAULT: [pickle.dumps(self._fault)]}

    def _measure(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self._meter is None:
            self._meter = _build_meter(*self._arguments)
        records = [record for probes in batch["probes"] for record in self._meter.measure(decode_batch(probes))]
        return {name: [record[name] for record in records] for name in records[0]}


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


def _build_meter(model_name: str, revision: str, trust_remote_code: bool, config: TraceConfig) -> ProbeMeter:
    fetch_folder(Path(model_name))
    on_gpu = torch.cuda.is_available() and config.num_gpus_per_actor > 0
    # float32: rounding to bfloat16 alone moves JS by up to 3e-2
    model = load_causal_lm(model_name, revision=revision, trust_remote_code=trust_remote_code, dtype=torch.float32)
    return ProbeMeter(LayerRunner(model.to("cuda" if on_gpu else "cpu")), config)
