"""Proofs over ledgers: two runs trained on the same rows, or one run read every row exactly once per epoch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from layerplan.corpus.lanes import ROW_BITS
from layerplan.corpus.manifest import Manifest
from layerplan.errors import CorpusError
from layerplan.run_folder import LEDGER_NAME
from layerplan.train.ledger import hash_row_ids


@dataclass(frozen=True)
class LedgerStep:
    """The rows of one optimizer step, sorted."""

    step: int
    row_ids: tuple[int, ...]


@dataclass(frozen=True)
class EpochProof:
    """How often the rows of one source were read."""

    source: str
    num_rows: int
    full_epochs: int
    """Epochs in which every row was read exactly once."""
    rows_in_open_epoch: int
    """Rows of the last, unfinished epoch; each was read exactly once in it."""


def load_ledger(path: Path) -> list[LedgerStep]:
    """Reads a run's `ledger.jsonl`, or that of a run folder, and checks every line against its hash.

    Raises:
        CorpusError: When it is missing, torn, has a gap in its steps, or a hash that does not fit its rows.
    """
    file = path / LEDGER_NAME if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CorpusError(f"{file}: cannot be read ({error.strerror}); train with train.write_ledger=true") from None
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            step, ids, digest = int(fields["step"]), tuple(map(int, fields["row_ids"])), fields["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{file}:{number}: not a ledger line ({type(error).__name__}: {error})") from None
        if step != number:
            raise CorpusError(f"{file}:{number}: is step {step}, step {number} is expected")
        if digest != hash_row_ids(np.array(ids, dtype=np.int64)):
            raise CorpusError(f"{file}:{number}: step {step} has row ids its sha256 does not fit")
        steps.append(LedgerStep(step, ids))
    return steps


def check_equal(first: Sequence[LedgerStep], second: Sequence[LedgerStep]) -> int:
    """Returns the number of steps both have, on the same rows each.

    Raises:
        CorpusError: Naming the first step that differs, or the ledger that is shorter.
    """
    for one, two in zip(first, second, strict=False):
        if one != two:
            only_one, only_two = (
                Counter(one.row_ids) - Counter(two.row_ids),
                Counter(two.row_ids) - Counter(one.row_ids),
            )
            raise CorpusError(
                f"step {one.step}: the ledgers differ; only the first has rows {_shorten(only_one)},"
                f" only the second {_shorten(only_two)}"
            )
    if len(first) != len(second):
        raise CorpusError(f"the ledgers agree on {min(len(first), len(second))} steps, then one of them ends")
    return len(first)


def check_epochs(steps: Sequence[LedgerStep], manifest: Manifest) -> list[EpochProof]:
    """Proves that each source's rows were read epoch after epoch, each row exactly once in each.

    Raises:
        CorpusError: Naming the first step and row that break it.
    """
    if manifest.mode == "on_the_fly":
        return [_check_chunks(steps)]
    streams = [(source.path, source.num_rows) for source in manifest.sources]
    if manifest.sources[0].weight is None:
        streams = [("all sources", manifest.num_rows)]
    proofs = []
    first = 0
    for name, num_rows in streams:
        proofs.append(_check_stream(steps, name, first, num_rows))
        first += num_rows
    total = sum(proof.full_epochs * proof.num_rows + proof.rows_in_open_epoch for proof in proofs)
    taken = sum(len(step.row_ids) for step in steps)
    if total != taken:
        raise CorpusError(f"{taken - total} row ids of the ledger are not in the store")
    return proofs


def _check_stream(steps: Sequence[LedgerStep], name: str, first: int, num_rows: int) -> EpochProof:
    seen = np.zeros(num_rows, dtype=np.int64)
    epoch = num_read = 0
    for step in steps:
        ids = np.array([row - first for row in step.row_ids if first <= row < first + num_rows], dtype=np.int64)
        np.add.at(seen, ids, 1)
        num_read += len(ids)
        before, epoch = epoch, num_read // max(num_rows, 1)
        # an epoch may end within a batch: then every row has been read `epoch` times, and some once more
        repeated = ids[seen[ids] > epoch + 1]
        if len(repeated):
            raise CorpusError(f"step {step.step}: row {first + int(repeated[0])} of {name} is read twice in an epoch")
        if epoch > before and int(seen.min()) < epoch:
            missing = first + int(np.argmin(seen))
            raise CorpusError(f"step {step.step}: epoch {epoch} of {name} ended without row {missing}")
    return EpochProof(name, num_rows, epoch, num_read - epoch * num_rows)


def _check_chunks(steps: Sequence[LedgerStep]) -> EpochProof:
    """On the fly a row id names a chunk of an epoch and a row of it: each chunk is read from its first row on, in order."""
    following: Counter[int] = Counter()
    for step in steps:
        for row_id in step.row_ids:
            position, row = row_id >> ROW_BITS, row_id & (2**ROW_BITS - 1)
            if row != following[position]:
                fault = (
                    "was trained on already" if row < following[position] else f"comes before row {following[position]}"
                )
                raise CorpusError(f"step {step.step}: row {row} of chunk {position} {fault}")
            following[position] += 1
    total = sum(following.values())
    return EpochProof("rows made while training", total, 0, total)


def _shorten(rows: Counter[int]) -> str:
    ids = sorted(rows.elements())
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "") or "none"
