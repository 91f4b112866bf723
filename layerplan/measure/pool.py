"""Measurements of a model on a pool of actors, to a file; what was measured before an interruption is not repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerplan.actor_pool import ActorPool, map_over_actors
from layerplan.artifacts import compute_sha256, read_lines
from layerplan.config.corpus import CorpusConfig
from layerplan.config.measure import MeasureConfig, Measurement
from layerplan.config.train import TrainConfig
from layerplan.corpus.decontamination import BenchmarkText
from layerplan.errors import ModelError
from layerplan.measure.actor import MeasuringActor
from layerplan.measure.assemble import Measured, assemble
from layerplan.measure.pilot import count_pilot_steps
from layerplan.measure.text import TextRows, read_text
from layerplan.measure.weights import WeightActor, list_matrices
from layerplan.measure.work import Piece, list_pieces
from layerplan.models.footprint import estimate_actor_memory
from layerplan.models.ref import ModelRef
from layerplan.plan.layer_measurement import LayerMeasurement
from layerplan.progress import ProgressLines
from layerplan.run_folder import MEASURED_NAME
from layerplan.tracking.journal import Journal


def measure_model(
    model: ModelRef,
    wanted: Sequence[Measurement],
    *,
    config: MeasureConfig,
    train: TrainConfig,
    corpus: CorpusConfig,
    out_dir: Path,
    questions: Sequence[BenchmarkText] = (),
    report: Callable[[str], None] = lambda line: None,
) -> list[LayerMeasurement]:
    """Takes the measurements. Ray must be initialised.

    Every finished piece is noted in `measured.jsonl`; a piece that is there, of the same weights, text and options, is
    not measured again. The numbers are a function of model, text and options, whichever process made them.

    Args:
        model: What is measured.
        wanted: Names of measurements.
        config: Rows, lengths, seeds, actors.
        train: Optimizer and steps of the run, which `pilot` is a part of.
        corpus: Where the text comes from.
        out_dir: Folder of `measured.jsonl`.
        questions: Text that must not be measured on.
        report: Told how far the work is.

    Raises:
        CorpusError: When there is too little text.
        ModelError: When the model cannot be measured.
    """
    pilot_steps = count_pilot_steps(train.max_steps, config.pilot_share)
    pilot_rows = range(config.num_rows, config.num_rows + pilot_steps * config.pilot_rows)
    text = _read_text(model, wanted, config, corpus, questions, pilot_rows)
    matrices = list_matrices(model) if "spectrum" in wanted else []
    pieces = list_pieces(wanted, config, matrices, pilot_rows)
    inputs = compute_sha256(
        {
            "model": model.identity().model_dump(mode="json"),
            "text": None if text is None else text.describe().sha256,
            "config": config.model_dump(
                mode="json", exclude={"num_actors", "num_cpus_per_actor", "num_gpus_per_actor", "labels"}
            ),
            "optimizer": train.optimizer.model_dump(mode="json"),
        }
    )
    done = _do(pieces, model, config, train, text, _Ledger(out_dir / MEASURED_NAME, inputs), report)
    return assemble(
        wanted, Measured(pieces, done), model=model, config=config, train=train, text=text, matrices=matrices
    )


class _Ledger:
    """What is done, by the inputs it was done with."""

    def __init__(self, path: Path, inputs: str) -> None:
        lines = [line for line in read_lines(path) if line.get("inputs") == inputs]
        self.done: dict[str, dict[str, Any]] = {line["key"]: line for line in lines}
        self._inputs, self._journal = inputs, Journal(path)

    def add(self, key: str, values: list[list[float]], seconds: float) -> None:
        """Notes a finished piece."""
        self.done[key] = {"key": key, "values": values, "seconds": seconds}
        self._journal.append({"inputs": self._inputs, **self.done[key]})


def _read_text(
    model: ModelRef,
    wanted: Sequence[Measurement],
    config: MeasureConfig,
    corpus: CorpusConfig,
    questions: Sequence[BenchmarkText],
    pilot_rows: range,
) -> TextRows | None:
    if set(wanted) <= {"spectrum"}:
        return None
    num_rows = pilot_rows.stop if "pilot" in wanted else config.num_rows
    return read_text(corpus, model, num_rows=num_rows, seq_len=config.seq_len, seed=config.seed, questions=questions)


def _do(
    pieces: Sequence[Piece],
    model: ModelRef,
    config: MeasureConfig,
    train: TrainConfig,
    text: TextRows | None,
    ledger: _Ledger,
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    left = [piece for piece in pieces if piece.key not in ledger.done]
    if len(left) < len(pieces):
        report(f"{len(pieces) - len(left)} of {len(pieces)} pieces were measured before")
    by_weights = [piece.fields for piece in left if piece.matrix is not None]
    by_text = [piece.fields for piece in left if piece.matrix is None]
    if by_weights:
        pool = ActorPool(
            config.num_actors,
            config.num_cpus_per_actor,
            what="a measuring process",
            error=ModelError,
            labels=config.labels,
        )
        _map(pool, WeightActor, (), by_weights, "matrices read", ledger, report)
    if by_text:
        assert text is not None, "these pieces read text"
        vocab = model.shape().vocab_size
        memory = estimate_actor_memory(
            model, "float32", num_gpus=config.num_gpus_per_actor, num_logits=4 * config.seq_len * vocab
        )
        needs_optimizer = any(row["measurement"] == "pilot" for row in by_text)
        pool = ActorPool(
            config.num_actors,
            config.num_cpus_per_actor,
            config.num_gpus_per_actor,
            "a measuring process",
            ModelError,
            memory * (5 if needs_optimizer else 2),  # with gradients, and both moments and a copy
            config.labels,
        )
        arguments = (model, config, train.optimizer, text.ids)
        _map(pool, MeasuringActor, arguments, by_text, "pieces measured", ledger, report)
    return ledger.done


def _map(
    pool: ActorPool,
    actor: type,
    arguments: tuple[Any, ...],
    rows: list[dict[str, Any]],
    what: str,
    ledger: _Ledger,
    report: Callable[[str], None],
) -> None:
    progress = ProgressLines(what, len(rows), report)
    for row in map_over_actors(pool, actor, arguments, rows, take="rows", progress=progress):
        values = [[float(value) for value in repeat] for repeat in row["values"]]
        ledger.add(str(row["key"]), values, float(row["seconds"]))
