"""SALF's measurement of prompts with a label: how far each layer's state is from the label, and what the model answers.

One intact pass per prompt, by the same replicas as the tracer's and with the same restarts: `layerplan/actor_pool.py`.
Shapes: B prompts, T tokens, L layers, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from layerplan.actor_pool import ActorPool, map_over_actors
from layerplan.artifacts import compute_sha256
from layerplan.aside import writing_aside
from layerplan.config.trace import TraceConfig
from layerplan.errors import ModelError, ProbeError
from layerplan.models.footprint import estimate_actor_memory
from layerplan.models.ref import ModelRef
from layerplan.models.semantic_bases import SemanticBases
from layerplan.progress import ProgressLines
from layerplan.tracer.deviations import STATES_AT_ONCE, measure_deviations
from layerplan.tracer.model_runner import LayerRunner
from layerplan.tracer.pool import check_complete

MAX_TOKENS = 8192
"""Tokens of a forward pass."""
SAMPLES_SHA256 = b"samples_sha256"
"""In the file of the records: hash of the samples they are of."""


@dataclass(frozen=True)
class Sample:
    """A prompt's ids and the token that follows it."""

    id: str
    input_ids: tuple[int, ...]
    label_id: int


class SampleActor:
    """Maps rows that hold one batch of samples of one length each to one row per sample."""

    def __init__(self, model: ModelRef, config: TraceConfig) -> None:
        on_gpu = torch.cuda.is_available() and config.num_gpus_per_actor > 0
        loaded = model.load(dtype=torch.float32)
        self._runner = LayerRunner(loaded.to("cuda" if on_gpu else "cpu"))
        self._norm = config.deviation_norm
        self._bases = SemanticBases(self._runner.parts.lm_head.weight)
        self._is_checked = False

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Measures the batches; every output column has one entry per sample."""
        records = [record for samples in batch["samples"] for record in self.measure(samples)]
        return {name: [record[name] for record in records] for name in records[0]}

    def measure(self, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One record per sample, in order: `predicted_id`, and the deviations by kind, L + 1 values each."""
        runner = self._runner
        ids_BT = torch.tensor([list(sample["input_ids"]) for sample in samples], device=runner.device)
        label_B = torch.tensor([int(sample["label_id"]) for sample in samples], device=runner.device)
        if not self._is_checked:
            runner.check_lens(ids_BT[:1])
            self._is_checked = True
        last_LBD = self._run(ids_BT)
        predicted = runner.lens(last_LBD[-1]).argmax(-1).tolist()
        found = measure_deviations(runner, self._bases, last_LBD, label_B, self._norm)
        columns = {f"deviation_{kind}": values.T.cpu().numpy() for kind, values in found.items()}
        return [
            {"id": str(sample["id"]), "label_id": int(sample["label_id"]), "predicted_id": predicted[row]}
            | {name: values[row] for name, values in columns.items()}
            for row, sample in enumerate(samples)
        ]

    def _run(self, ids_BT: Tensor) -> Tensor:
        """States of the last position around every block, l = 0..L: (L + 1, B, D)."""
        states: list[Tensor] = []

        def enter(layer_idx: int, hidden: Tensor) -> Tensor:
            return leave(hidden)

        def leave(hidden: Tensor) -> Tensor:
            states.append(hidden[:, -1])
            return hidden

        with self._runner.intercepting(len(ids_BT), enter, leave):
            self._runner.forward(ids_BT)
        return torch.stack(states)


def measure_samples(
    model: ModelRef,
    samples: Sequence[Sample],
    config: TraceConfig,
    *,
    path: Path,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measures every sample once, in the given order; a finished measurement is read back. Ray must be initialised.

    Args:
        model: What is measured.
        samples: With distinct ids.
        config: Replicas, batch size and norm of the tracer.
        path: Parquet file of the records; complete or absent.
        report: Takes lines on how far it is.

    Raises:
        ModelError: When the model cannot be measured.
        ProbeError: When the file's samples are others, or one was measured twice.
    """
    if not path.exists():
        write_records(path, samples, _measure(model, samples, config, report))
    table = pq.read_table(path)
    records_read: list[dict[str, Any]] = table.to_pylist()
    check_complete([sample.id for sample in samples], [record["id"] for record in records_read])
    known = (table.schema.metadata or {}).get(SAMPLES_SHA256)
    if known is not None and known.decode() != hash_samples(samples):
        raise ProbeError(
            f"{path}: prompts of the same ids have other tokens or labels now; remove it to measure them, or choose another"
            " name"
        )
    return records_read


def hash_samples(samples: Sequence[Sample]) -> str:
    """Of ids, tokens and labels, in order: an id may be no more than the number of a line."""
    return compute_sha256([[sample.id, list(sample.input_ids), sample.label_id] for sample in samples])


@torch.no_grad()
def measure_here(model: ModelRef, samples: Sequence[Sample], config: TraceConfig) -> list[dict[str, Any]]:
    """Measures samples in this process, without Ray; records as of `SampleActor`, in the order of `cut_batches`."""
    actor = SampleActor(model, config)
    return [record for batch in cut_batches(samples, config) for record in actor.measure(batch)]


def write_records(path: Path, samples: Sequence[Sample], found: Sequence[dict[str, Any]]) -> None:
    """Writes the records of samples in the samples' order; of two of one sample, the later.

    Raises:
        ProbeError: When a sample has no record, or a record no sample.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    records = {record["id"]: record for record in found}
    check_complete([sample.id for sample in samples], list(records))
    table = pa.Table.from_pylist([_plain(records[sample.id]) for sample in samples])
    table = table.replace_schema_metadata({SAMPLES_SHA256: hash_samples(samples)})
    with writing_aside(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def cut_batches(samples: Sequence[Sample], config: TraceConfig) -> list[list[dict[str, Any]]]:
    """Samples as an actor takes them, those of one length together."""
    ordered = sorted(samples, key=lambda sample: (len(sample.input_ids), sample.id))
    batches = []
    for length, members in groupby(ordered, key=lambda sample: len(sample.input_ids)):
        same, size = [vars(each) for each in members], max(1, min(config.batch_size, MAX_TOKENS // length))
        batches += [same[at : at + size] for at in range(0, len(same), size)]
    return batches


def _measure(
    model: ModelRef, samples: Sequence[Sample], config: TraceConfig, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows = [{"samples": batch} for batch in cut_batches(samples, config)]
    memory = estimate_actor_memory(
        model, "float32", num_gpus=config.num_gpus_per_actor, num_logits=STATES_AT_ONCE * model.shape().vocab_size
    )
    pool = ActorPool(
        config.num_actors,
        config.num_cpus_per_actor,
        config.num_gpus_per_actor,
        "a tracer's process",
        ModelError,
        memory,
        config.labels,
    )
    progress = ProgressLines("prompts measured", len(samples), report)
    return list(map_over_actors(pool, SampleActor, (model, config), rows, take="rows", progress=progress))


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in record.items()}
